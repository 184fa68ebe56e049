"""Geometries by what critics measure: the points of each one's gradient search, on prompts that the search has not seen.

    python benchmarks/geometries.py ASSETS [--geometries norm_preserving conditional] [--directions 1] [--seeds 0]

Every point of the path is measured on the evaluation prompts, with --halfway also what lies between two: refusals, KL at the first
token, over the original's answers and over the model's own. The baseline is measured once. Prompt files as in benchmarks/study.py;
harmless_train may be completed by --more FILE, since a conditional edit needs prompts that the search does not use.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from common import head, opened, options, write
from rich.console import Console

from heretic.ablation.ablation import Ablation
from heretic.ablation.geometries import GEOMETRIES
from heretic.cli.ui.console import PlainReporter
from heretic.pipeline.gradient_search import run_gradient_search
from heretic.runs.folder import RunFolder
from heretic.scoring.scores import Scores
from heretic.session.input_maps import find_input_maps
from heretic.session.session import Session, operator_factory_for, weight_reader
from heretic.settings.sources import resolve

SCORERS = ("answer_kl", "own_answer_kl")


def main() -> None:
    """Search, measure, print, write the JSON."""
    parser = options(__doc__, "geometries.json")
    parser.add_argument("--geometries", nargs="+", default=["norm_preserving", "conditional"], choices=list(GEOMETRIES))
    parser.add_argument(
        "--directions", type=int, default=1, help="directions at once, by a self-organizing map if several"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluation", type=int, default=50, help="evaluation prompts of each kind")
    parser.add_argument("--more", type=Path, help="a text file with further harmless training prompts")
    parser.add_argument("--halfway", action="store_true", help="measure halfway between two points too")
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    reporter = PlainReporter(Console())
    with tempfile.TemporaryDirectory() as scratch:
        common = [*_training_prompts(arguments, Path(scratch)), *_evaluation(arguments), *arguments.extra]
        session, _ = opened(arguments.assets, arguments.model, common, Path(scratch), reporter)
        session.context.measurer.of_original(SCORERS)
        report: dict[str, Any] = head(arguments) | {"refused_before": session.baseline.refusals, "searches": []}
        for seed in arguments.seeds:
            for geometry in arguments.geometries:
                search = _searched(session, geometry, [*common, f"seed={seed}"], Path(scratch))
                step = 1 if arguments.halfway else 2
                found: dict[str, Any] = {"geometry": geometry, "seed": seed, "points": []}
                report["searches"].append(found)
                for name, searched, ablation in list(search)[::step]:
                    found["points"].append({"point": name, **_measured(searched, ablation)})
                    print(geometry, seed, found["points"][-1], flush=True)
                    write(report, arguments.out)


def _training_prompts(arguments: Any, folder: Path) -> list[str]:
    """Settings of the training sets: all prompts of the files, in a random order, so that searches and keys see all kinds."""
    found = []
    for role, more in (("harmful_train", None), ("harmless_train", arguments.more)):
        files = [arguments.assets / "prompts" / f"{role}.txt", *([more] if more else [])]
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        lines = list(dict.fromkeys(lines))
        random.Random(0).shuffle(lines)
        (folder / f"{role}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found += [f"prompts.{role}.source={folder / f'{role}.txt'}", f"prompts.{role}.split=train"]
    if arguments.directions > 1:
        found += ["directions.method=self_organizing_map", f"directions.count={arguments.directions}"]
    return found


def _evaluation(arguments: Any) -> list[str]:
    splits = [f"prompts.{role}.split=train[:{arguments.evaluation}]" for role in ("harmful_eval", "harmless_eval")]
    return ["max_response_length=32", f"measures={json.dumps(list(SCORERS))}", *splits]


def _searched(
    session: Session, geometry: str, assignments: list[str], folder: Path
) -> Iterator[tuple[str, Session, Ablation]]:
    """Run the gradient search in a geometry; yield its points, and those between them."""
    settings = resolve(None, {}, [*assignments, f"ablation.geometry={geometry}"], {}).settings
    parts = {part: getattr(settings, part) for part in ("seed", "search", "ablation")}
    context = replace(session.context, settings=session.context.settings.model_copy(update=parts))
    began = time.perf_counter()
    needed = GEOMETRIES[geometry].needs == "input_map"
    input_maps = find_input_maps(context, weight_reader(context.language_model)) if needed else {}
    factory = operator_factory_for(context, session.operator_factory.directions, input_maps)
    print(geometry, "prepared in", round(time.perf_counter() - began, 1), "s", flush=True)
    own = replace(session, context=context, operator_factory=factory)
    study = optuna.create_study(directions=["minimize", "minimize"])
    run_folder = RunFolder(folder / f"{geometry}-{settings.seed}", "geometries")
    run_folder.create()
    began = time.perf_counter()
    path = run_gradient_search(study, own, run_folder)
    assert path is not None and path.points, path
    print(geometry, "searched in", round(time.perf_counter() - began, 1), "s", flush=True)
    gains = {c: (1.0,) * session.context.language_model.structure.num_layers for c in path.points[0].strengths}
    for step in range(2 * len(path.points) - 1):
        yield f"{step / 2:g}", own, path.at(step / 2, gains, 0.0)


@torch.inference_mode()
def _measured(session: Session, ablation: Ablation) -> dict[str, Any]:
    began = time.perf_counter()
    with session.applied(ablation) as edited:
        (found,) = session.evaluator.score_trials(session.baseline.log_probs, edited)
    assert isinstance(found, Scores)
    (values,) = session.measure(SCORERS, [ablation])
    numbers = {f"{name}.{key}": n for name, m in values.items() for key, n in {"mean": m.value, **m.details}.items()}
    return {
        "refusals": found.refusals,
        "expected": round(found.expected, 2),
        "kl": found.divergence.mean,
        "kl_p95": found.divergence.p95,
        **numbers,
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    main()
