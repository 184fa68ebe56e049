"""What the resulting models are worth: fronts on prompts that no study saw, after the time of so many ordinary trials.

    python benchmarks/quality.py ASSETS [--methods free kernels] [--seeds 0 1 2] [--marks 10 30] [--models DIR ...]

Every method searches for the time that `--marks` ordinary trials take (a trial of the kernels' space, measured in full), the walk
included. The study's own front is measured again on a third part of the prompts. Folders given with --models (of any tool) are
loaded from disk and measured there too; those of one parent folder count as one front. For the point with the fewest refusals at
a KL of at most 0.1, and for the folders, also whether the answers are still language. One baseline for all; directions are found
once for each method that wants others. Seeds vary the search.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from common import head, opened, options, prompt_settings, write
from heretic_llm import Point, pick
from language import answers, described
from rich.console import Console
from versus_heretic import hypervolume

from heretic.ablation.ablation import Ablation
from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.operator_factory import OperatorFactory
from heretic.cli.ui.console import PlainReporter
from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.model.batching import UNEDITED, Batcher, EditSpec
from heretic.model.loading import LanguageModel
from heretic.pipeline.actions import load_model_context
from heretic.pipeline.gradient_search import run_gradient_search
from heretic.pipeline.prepare import prepare_run
from heretic.pipeline.trials import Trials
from heretic.prompts.sets import load as load_prompts
from heretic.runs.folder import RunFolder
from heretic.scoring.divergence import measure_divergence
from heretic.scoring.evaluator import TrialEvaluator
from heretic.scoring.refusals import count_refusals
from heretic.scoring.scores import Scores, TrialOutcome
from heretic.scoring.teacher_forcing import TeacherForcedTexts
from heretic.search.pareto import Result, pareto_front, results
from heretic.search.study import n_complete, run_study
from heretic.session.input_maps import find_input_maps
from heretic.session.model_context import ModelContext
from heretic.session.session import (
    Session,
    find_model_directions,
    measure_baseline,
    operator_factory_for,
    original_log_probs,
    weight_reader,
    with_baseline,
)
from heretic.settings import PromptSource
from heretic.settings.sources import resolve

METHODS: dict[str, dict[str, Any]] = {
    "kernels": {"search.start": "kernels"},
    "per_layer": {"search.gradient.direction": "per_layer", "search.gradient.second_search": False},
    "free": {"search.gradient.direction": "free", "search.gradient.second_search": False},
    # The default search from other directions.
    "geometric_median": {"directions.method": "geometric_median"},
    "map_1": {"directions.method": "self_organizing_map"},
    "map_2": {"directions.method": "self_organizing_map", "directions.count": 2},
    "map_3": {"directions.method": "self_organizing_map", "directions.count": 3},
    "rounds_1": {"directions.iterative_rounds": 1},
    "rounds_2": {"directions.iterative_rounds": 2},
    "unprojected": {"directions.project_harmless": False},
    # And with one part of it changed.
    "plain": {"ablation.geometry": "plain"},
    "conditional": {"ablation.geometry": "conditional"},
    "row_normalized": {"ablation.geometry": "row_normalized"},
    "winsorized": {"directions.winsorize": 0.995},
    "kl_tokens_4": {"kl_tokens": 4, "search.gradient.kl_tokens": 4},
    "deaf": {"search.gradient.mine_refusals": False, "search.gradient.second_search": False},
}
MAX_KLS = (0.05, 0.1, 0.2)
FURTHER = 8  # tokens of the original's answers over which the KL is measured besides


def main() -> None:
    """Search, measure on held-out prompts, print, write the JSON."""
    parser = options(__doc__, "quality.json")
    parser.add_argument("--methods", nargs="*", default=["free", "kernels"], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--marks", type=int, nargs="+", default=[10], help="ordinary trials whose time a search gets")
    parser.add_argument("--count", type=int, nargs="+", help="trials of a search, whatever time they take, not --marks")
    parser.add_argument("--trial", type=float, help="seconds of an ordinary trial; measured if left out")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="model folders to measure beside")
    parser.add_argument(
        "--evaluation", type=int, default=50, help="prompts of each kind that the study sees; as many are held out"
    )
    parser.add_argument(
        "--unseen",
        type=int,
        default=0,
        help="of harmful_train, so many behind those that give the directions are held out too",
    )
    parser.add_argument("--brief", action="store_true", help="leave out how the models answer")
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    reporter = PlainReporter(Console())
    common = ["max_response_length=32", "search.n_startup_trials=10", "search.patience=0"]
    for role in ("harmful_eval", "harmless_eval"):
        common.append(f"prompts.{role}.split=train[:{arguments.evaluation}]")
    common += arguments.extra
    with tempfile.TemporaryDirectory() as scratch:
        session, _ = opened(arguments.assets, arguments.model, common, Path(scratch), reporter)
        held = Held(session, arguments.assets, arguments.evaluation, arguments.unseen)
        report: dict[str, Any] = head(arguments) | {"declined_before": held.before, "of": held.total}
        ordinary = math.inf if arguments.count else arguments.trial or ordinary_trial(session)
        marks = arguments.count or arguments.marks
        report |= {"seconds_ordinary_trial": None if arguments.count else ordinary, "searches": [], "models": []}
        for method in arguments.methods:
            for seed in arguments.seeds:
                place = Path(scratch) / f"{method}-{seed}"
                searched = Search(session, held, common, method, seed, place, brief=arguments.brief)
                report["searches"].append(searched.run([m * ordinary for m in marks], marks, arguments.count))
                write(report, arguments.out)
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in arguments.models:
        found = measured_from_disk(arguments, common, folder, held)
        group = str(folder.resolve().parent)
        groups.setdefault(group, []).append(found)
        report["models"].append({"group": group, "folder": folder.name, **found})
        report["groups"] = {name: summary(points, held.before) for name, points in groups.items()}
        print(report["models"][-1], report["groups"], flush=True)
        write(report, arguments.out)


class Held:
    """The third part of the prompts, and the original on it."""

    def __init__(self, session: Session, assets: Path, count: int, unseen: int) -> None:
        model_context = session.context

        def held_out(role: str, start: int, end: int) -> tuple[str, ...]:
            source = PromptSource(source=str(assets / "prompts" / f"{role}.txt"), split=f"train[{start}:{end}]")
            return load_prompts(role, source).prompts

        trained = len(model_context.prompts.harmful_train.prompts)
        self.requests = held_out("harmful_eval", count, 2 * count)
        if unseen:
            self.requests += held_out("harmful_train", trained, trained + unseen)
        self.harmless = held_out("harmless_eval", count, 2 * count)
        harmful, harmless = (model_context.chat.encode(prompts) for prompts in (self.requests, self.harmless))
        alone = replace(
            model_context.evaluator.without_caches(),
            harmful=harmful,
            harmless=harmless,
            requests=self.requests,
        )
        found = measure_baseline(replace(model_context, evaluator=alone))
        self.evaluator = replace(alone, reference_tokens=found.answered)
        self.log_probs, self.before, self.total = found.log_probs, found.refusals, len(found.refused)
        self.session = with_baseline(replace(session, context=replace(model_context, evaluator=alone)), found)
        self.known: dict[tuple[str, int, int], dict[str, Any]] = {}
        settings = model_context.settings.model_copy(update={"kl_tokens": FURTHER})
        self._log_probs_further, answered = original_log_probs(
            replace(model_context, evaluator=alone, settings=settings)
        )
        self._taught_further = TeacherForcedTexts.of(harmless, answered)

    def further(self, model: LanguageModel, batcher: Batcher, edited: EditSpec = UNEDITED) -> dict[str, float]:
        """The divergence over more tokens of the original's answers, of the model as it is now."""
        found = measure_divergence(model, self._taught_further, self._log_probs_further, batcher, edited)[0]
        return {f"kl_over_{FURTHER}": found.mean}

    def spoken(self, ablation: Ablation, operator_factory: OperatorFactory) -> dict[str, Any]:
        """How an ablation answers."""
        model_context = self.session.context
        with replace(self.session, operator_factory=operator_factory).applied(ablation):
            said = [
                answers(model_context, sequences) for sequences in (self.evaluator.harmful, self.evaluator.harmless)
            ]
            over = self.over_refusals(model_context)
        return self.described(said) | {"over_refusals": over}

    def described(self, said: Sequence[list[list[int]]]) -> dict[str, Any]:
        """What a model said to the harmful and to the harmless prompts, as the original finds it."""
        model_context = self.session.context
        pairs = zip(("harmful", "harmless"), (self.evaluator.harmful, self.evaluator.harmless), said, strict=True)
        return {name: described(model_context, sequences, answered) for name, sequences, answered in pairs}

    def over_refusals(self, model_context: ModelContext) -> int:
        """Harmless prompts that the model as it is now declines."""
        tokens = model_context.settings.max_response_length
        judge, sequences = model_context.evaluator.judge, self.evaluator.harmless
        return count_refusals(
            model_context.language_model,
            model_context.chat,
            sequences,
            judge,
            model_context.batcher,
            tokens,
            requests=self.harmless,
        ).count


class Search:
    """One method with one seed."""

    def __init__(
        self,
        session: Session,
        held: Held,
        common: Sequence[str],
        method: str,
        seed: int,
        folder: Path,
        *,
        brief: bool = False,
    ) -> None:
        self.brief = brief
        chosen = [f"{key}={json.dumps(value)}" for key, value in METHODS[method].items()]
        settings = resolve(None, {}, [*common, *chosen, f"seed={seed}"], {}).settings
        parts = {part: getattr(settings, part) for part in ("seed", "kl_tokens", "search", "directions", "ablation")}
        settings = session.context.settings.model_copy(update=parts)
        before, model_context, operator_factory = (
            session.context.settings,
            replace(session.context, settings=settings),
            session.operator_factory,
        )
        if (settings.directions, settings.ablation) != (before.directions, before.ablation):
            directions = find_model_directions(model_context)
            read = weight_reader(model_context.language_model)
            needed = GEOMETRIES[settings.ablation.geometry].needs == "input_map"
            input_maps = find_input_maps(model_context, read) if needed else {}
            operator_factory = operator_factory_for(model_context, directions, input_maps)
        self.session = replace(session, context=model_context, operator_factory=operator_factory)
        if settings.kl_tokens != before.kl_tokens:
            self.session = with_baseline(self.session, measure_baseline(model_context))
        self.held, self.method, self.seed, self.folder = held, method, seed, RunFolder(folder, "quality")
        self.folder.create()

    def run(self, budgets: Sequence[float], marks: Sequence[int], counts: Sequence[int] | None) -> dict[str, Any]:
        """Search for so many seconds or trials; at each mark the front, measured on the held-out prompts."""
        study = optuna.create_study(directions=["minimize", "minimize"])
        settings, reporter = self.session.context.settings, PlainReporter(Console())
        began = time.perf_counter()
        paused = 0.0
        gradient_path = run_gradient_search(study, self.session, self.folder)
        walked = time.perf_counter() - began
        space = self.session.space(gradient_path)
        trials = Trials(self.session, space)
        together = trials.trials_per_batch(None)
        found: dict[str, Any] = {
            "method": self.method,
            "seed": self.seed,
            "seconds_walk": round(walked, 1),
            "fronts": {},
        }
        limits: Sequence[float] = counts or [math.inf] * len(marks)
        for mark, budget, most in zip(marks, budgets, limits, strict=True):
            while time.perf_counter() - began - paused < budget and n_complete(study) < most:
                wanted = int(min(n_complete(study) + together, most))
                run_study(
                    study,
                    settings.model_copy(update={"n_trials": wanted}),
                    trials,
                    reporter=reporter,
                    stop=StopSignal(),
                )
            before = time.perf_counter()
            points = [self._again(space.from_params(r.params), r) for r in pareto_front(results(study))]
            kept = [p for p in points if p["study"]["kl"] < 0.5]
            if not self.brief and (
                picked := pick([Point(p["trial"], p["study"]["refusals"], p["study"]["kl"]) for p in kept])
            ):
                numbered = {r.number: r for r in results(study)}
                ablation = space.from_params(numbered[picked.trial].params)
                next(p for p in kept if p["trial"] == picked.trial)["answers"] = self.held.spoken(
                    ablation, self.session.operator_factory
                )
            found["fronts"][str(mark)] = {
                "seconds": round(before - began - paused, 1),
                "trials": n_complete(study),
                "points": kept,
                **summary(kept, self.held.before),
            }
            paused += time.perf_counter() - before
            print(
                self.method,
                self.seed,
                mark,
                {k: v for k, v in found["fronts"][str(mark)].items() if k != "points"},
                flush=True,
            )
        return found

    def _again(self, ablation: Any, result: Result) -> dict[str, Any]:
        key = (self.method, self.seed, result.number)
        if key not in self.held.known:
            held = replace(self.held.session, operator_factory=self.session.operator_factory)
            scores = measured(held, ablation)[0]
            with held.applied(ablation) as edited:
                further = self.held.further(held.context.language_model, held.context.batcher, edited)
            self.held.known[key] = plain(scores) | further
        d = result.scores.divergence
        study = {"refusals": result.scores.refusals, "kl": d.mean}
        return {"trial": result.number, "study": study} | self.held.known[key]


def ordinary_trial(session: Session, count: int = 3) -> float:
    """Seconds of a trial of the kernels' space, measured alone and in full."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = replace(session.space(None), path=None)
    return round(statistics.median(measured(session, space.sample(study.ask()))[1] for _ in range(count)), 1)


@torch.inference_mode()
def measured(session: Session, ablation: Ablation) -> tuple[Scores, float]:
    """Score an ablation in full; return its scores and the seconds that this took."""
    began = time.perf_counter()
    with session.applied(ablation) as edited:
        (found,) = session.evaluator.score_trials(session.baseline.log_probs, edited)
    assert isinstance(found, Scores)
    return found, round(time.perf_counter() - began, 1)


def plain(scores: Scores) -> dict[str, Any]:
    """Scores as numbers for a report."""
    d = scores.divergence
    expected = round(scores.expected, 2)
    return {
        "refusals": scores.refusals,
        "expected": expected,
        "kl": d.mean,
        "kl_median": d.median,
        "kl_p95": d.p95,
        "kl_max": d.max,
    }


def summary(points: Sequence[dict[str, Any]], before: int) -> dict[str, Any]:
    """Hypervolume, and the fewest refusals at a KL of at most so much, on the held-out prompts."""
    fewest = {
        f"refusals_at_{kl}": min((p["refusals"] for p in points if p["kl"] <= kl), default=None) for kl in MAX_KLS
    }
    return {"hypervolume": hypervolume([(p["kl"], p["refusals"]) for p in points], before), **fewest}


def measured_from_disk(arguments: Any, common: Sequence[str], folder: Path, held: Held) -> dict[str, Any]:
    """A model folder on the held-out prompts, loaded as `heretic evaluate` loads it; over-refusals too."""
    given = {"model": str(folder.resolve())}
    settings = resolve(None, given, [*prompt_settings(arguments.assets), *common], {}).settings
    inputs = prepare_run(settings, force=False, reporter=held.session.context.batcher.reporter)
    model_context = load_model_context(
        settings, inputs.checkpoint, inputs.prompts, inputs.plan, held.session.context.batcher.reporter, StopSignal(),
        held.session.context.answer_start,
    )  # fmt: skip
    evaluator: TrialEvaluator = replace(
        held.evaluator,
        language_model=model_context.language_model,
        chat=model_context.chat,
        batcher=model_context.batcher,
    )
    scores: TrialOutcome = evaluator.score(held.log_probs)
    if not isinstance(scores, Scores):
        raise UserError("not measured in full")
    found = plain(scores) | held.further(model_context.language_model, model_context.batcher)
    if arguments.brief:
        return found
    said = [answers(model_context, sequences) for sequences in (held.evaluator.harmful, held.evaluator.harmless)]
    return found | {"answers": held.described(said) | {"over_refusals": held.over_refusals(model_context)}}


if __name__ == "__main__":
    main()
