"""Geometries by what critics measure: the points of each one's gradient search, on prompts that the search has not seen.

    python benchmarks/geometries.py ASSETS [--geometries norm_preserving conditional] [--set "search.gradient.steps=5"]

Measured on the evaluation prompts: refusals, KL at the first token, over the original's answers and over the model's own.
Directions and searches are from the first 100 training prompts of each kind, as in benchmarks/study.py. The keys of a conditional
edit are from those of the files that the search does not use, and from the harmless prompts of --more, by default of the demo.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
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
from heretic.scoring.refusals import count_refusals
from heretic.scoring.scorers.answer_kl import AnswerKl
from heretic.scoring.scorers.measuring import Measurer
from heretic.scoring.scorers.own_answer_kl import OwnAnswerKl
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs
from heretic.search.gradient_path import PathPoint
from heretic.session.input_maps import find_input_maps
from heretic.session.session import (
    ModelContext,
    Session,
    find_model_directions,
    load_model_context,
    operator_factory_for,
    weight_reader,
)
from heretic.settings.sources import resolve

TOKENS = 8  # of the answers, for the KL over them
DEMO = Path(__file__).parents[1] / "src" / "heretic" / "data" / "prompts" / "other_train.txt"


def main() -> None:
    """Search, measure, print, write the JSON."""
    parser = options(__doc__, "geometries.json")
    parser.add_argument("--geometries", nargs="+", default=["norm_preserving", "conditional"], choices=list(GEOMETRIES))
    parser.add_argument("--keys", type=int, nargs=2, default=[76, 150], help="harmful and harmless prompts for keys")
    parser.add_argument("--more", type=Path, default=DEMO, help="a text file with further harmless prompts for keys")
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    reporter, stop = PlainReporter(Console()), StopSignal()
    report: dict[str, Any] = head(arguments) | {"searches": []}
    with tempfile.TemporaryDirectory() as scratch:
        given = {"model": str((arguments.assets / arguments.model).resolve()), "runs_dir": scratch}
        common = [*prompt_settings(arguments.assets), "max_response_length=32", 'response_prefix=""', *arguments.extra]
        settings = resolve(None, given, common, {}).settings
        inputs = prepare_run(settings, force=True, reporter=reporter)
        context = load_model_context(settings, inputs.checkpoint, inputs.prompts, inputs.plan, reporter, stop)
        scoring = Scoring(context)
        for geometry in arguments.geometries:
            edit = settings.ablation.model_copy(update={"geometry": geometry})
            own = replace(context, settings=settings.model_copy(update={"ablation": edit}))
            needed = GEOMETRIES[geometry].needs == "input_map"
            factory = operator_factory_for(own, scoring.directions, input_maps(own, arguments) if needed else {})
            session = Session(own, None, factory, None)  # type: ignore[arg-type]  # the search needs no baseline
            folder = RunFolder(Path(scratch) / geometry, "geometries")
            folder.create()
            began = time.perf_counter()
            path = run_gradient_search(optuna.create_study(directions=["minimize", "minimize"]), session, folder)
            assert path is not None and path.points, path
            found = {"geometry": geometry, "seconds": round(time.perf_counter() - began, 1), "points": []}
            report["searches"].append(found)
            for point in reversed(path.points):
                found["points"].append(scoring.of(session, point))
                print(geometry, found["points"][-1], flush=True)
                write(report, arguments.out)


def input_maps(context: ModelContext, arguments: Any) -> Mapping[str, InputMap]:
    """The input maps, from prompts that neither the search nor the evaluation uses."""
    searched = context.settings.search.gradient.prompts

    def lines(file: Path) -> list[str]:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    harmful, harmless = (
        lines(arguments.assets / "prompts" / f"{kind}_train.txt")[searched:] for kind in ("harmful", "harmless")
    )
    asked = harmful[: arguments.keys[0]], [*harmless, *lines(arguments.more)][: arguments.keys[1]]
    encoded = {f"{kind}_train": context.chat.encode(a) for kind, a in zip(("harmful", "harmless"), asked, strict=True)}
    search = context.settings.search.model_copy(update={"start": "kernels"})  # none of these prompts is the search's
    settings = context.settings.model_copy(update={"search": search})
    return find_input_maps(replace(context, encoded=encoded, settings=settings), weight_reader(context.language_model))


class Scoring:
    """The original on the evaluation prompts, and what edits change."""

    def __init__(self, context: ModelContext) -> None:
        self.context, model = context, context.language_model
        harmless = context.encoded["harmless_eval"]
        self.first_tokens = TeacherForcedTexts.of(harmless, [[0]] * len(harmless))
        self.original = all_log_probs(model, self.first_tokens, context.batcher, "Original's answers")
        self.directions = find_model_directions(context)
        scorers = {"answer_kl": AnswerKl(tokens=TOKENS), "own_answer_kl": OwnAnswerKl(tokens=TOKENS)}
        self.measurer = Measurer(scorers, context.measurer.parts)

    @torch.inference_mode()
    def of(self, session: Session, point: PathPoint) -> dict[str, Any]:
        """Measure one point of a path."""
        context, model = self.context, self.context.language_model
        with session.applied(point.ablation) as edited:
            kl = measure_divergence(model, self.first_tokens, self.original, context.batcher, edited)[0]
            refusals = count_refusals(
                model,
                context.chat,
                context.encoded["harmful_eval"],
                context.evaluator.judge,
                context.batcher,
                context.settings.max_response_length,
                requests=context.prompts.harmful_eval.prompts,
            )
        (found,) = self.measurer.of_trials(list(self.measurer.scorers), lambda *_: session.applied(point.ablation), 1)
        numbers = {f"{name}.{key}": n for name, m in found.items() for key, n in {"mean": m.value, **m.details}.items()}
        counted = {"refusals": refusals.count, "evasive": refusals.evasive, "of": refusals.total}
        return {"weight": point.weight, **counted, "kl": kl.mean, "kl_p95": kl.p95, **numbers}


if __name__ == "__main__":
    main()
