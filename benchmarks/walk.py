"""The walk by gradient alone: seconds a step, and its points measured in full on prompts that it never saw.

    python benchmarks/walk.py ASSETS [--set search.gradient.steps=6 ...] [--out benchmarks/results/walk.json]

100 + 100 direction prompts, of which the walk uses some, 50 + 50 evaluation prompts, 32 tokens, float32. With --kernels N
random trials of the kernels' space are measured beside it, for the cost of a trial.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import torch
from common import head, opened, options, write
from rich.console import Console

from heretic.ablation.ablation import Ablation
from heretic.scoring.ladder import Scores
from heretic.screen.console import Plain
from heretic.search.gradient import State
from heretic.session import Session
from heretic.strengths import begin, prepare


def main() -> None:
    """Walk, measure, print, write the JSON."""
    parser = options(__doc__, "walk.json")
    parser.add_argument("--set", action="append", default=[], dest="extra")
    parser.add_argument("--runs", type=Path, help="keep the original's baseline and directions here for another time")
    parser.add_argument("--kernels", type=int, default=0)
    arguments = parser.parse_args()
    watcher = Plain(Console())
    with tempfile.TemporaryDirectory() as scratch:
        session, _ = opened(
            arguments.assets,
            arguments.model,
            ["max_response_length=32", *arguments.extra],
            arguments.runs or Path(scratch),
            watcher,
        )
        report: dict[str, Any] = head(arguments) | {"declined_before": session.baseline.refusals}
        report |= {"gradient": session.bench.settings.search.gradient.model_dump(), "points": []}
        began = time.perf_counter()
        lesson = prepare(session)
        assert lesson is not None
        report["seconds_prepare"] = round(time.perf_counter() - began, 1)
        print(f"prepared in {report['seconds_prepare']} s: {len(lesson.declined)} refusals")
        seconds: list[float] = []
        last = time.perf_counter()

        def keep(state: State) -> None:
            nonlocal last
            seconds.append(time.perf_counter() - last)
            last = time.perf_counter()

        state = begin(session)
        points = lesson.descent(keep).run(state)
        report["heard"] = len(state.heard)
        report |= {"seconds_walk": round(sum(seconds), 1), "seconds_step": round(statistics.median(seconds), 2)}
        print(f"walk: {report['seconds_walk']} s, {report['seconds_step']} s a step")
        for point in points:
            scores, took = measured(session, point.ablation)
            report["points"].append({**asdict(point), "scores": scores.as_dict(), "seconds": took})
            print(
                f"weight {point.weight:<5g} held back {point.kl:.4f} / {point.probability:.3f}; "
                f"{scores.refusals}/{scores.total} at {scores.divergence} ({took} s); "
                + ", ".join(f"{c}: {sum(s > 0 for s in p)} sum {sum(p):.1f}" for c, p in point.strengths.items()),
                flush=True,
            )
            write(report, arguments.out)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        took_each = [measured(session, session.space(None).sample(study.ask()))[1] for _ in range(arguments.kernels)]
        report["seconds_trial"] = took_each
        write(report, arguments.out)


@torch.inference_mode()
def measured(session: Session, ablation: Ablation) -> tuple[Scores, float]:
    """An ablation's scores in full, and how long they took."""
    began = time.perf_counter()
    with session.applied(ablation) as edited:
        (found,) = session.ladder.score_trials(session.baseline.log_probs, edited)
    assert isinstance(found, Scores)
    return found, round(time.perf_counter() - began, 1)


if __name__ == "__main__":
    main()
