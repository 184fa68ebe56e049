"""What a trial costs, with each saving switched on and off in turn, and that the scores stay the same.

    python benchmarks/trial.py ASSETS [--trials 6] [--tokens 32] [--out benchmarks/results/trial.json]

The same random ablations are measured in every way. 100 + 100 direction prompts, 50 + 50 evaluation prompts, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from study import ROLES, cpu_name

from heretic.ablation.ablation import Ablation
from heretic.export.manifest import now, versions
from heretic.machine.gpus import usable_gpus, visible_gpus
from heretic.progress import SILENT
from heretic.run import look
from heretic.run_folder import RunFolder
from heretic.savings import trials_that_pay, with_savings
from heretic.scoring.ladder import Ladder, Scores
from heretic.search import space
from heretic.session import Session, open_session
from heretic.settings_layers import resolve
from heretic.stop import Stop

Way = Callable[[Session], tuple[Ladder, bool, int]]  # ladder, whether beginnings are shared, trials in a pass


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--eval", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "trial.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        session = opened(arguments, Path(folder))
    report: dict[str, Any] = {
        "command": f"python benchmarks/trial.py ASSETS --trials {arguments.trials} --tokens {arguments.tokens}",
        "date": now(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "gpus": [gpu.name for gpu in usable_gpus(visible_gpus())],
        "versions": versions(),
        "model": arguments.model,
        "ways": {},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name, found in measure(session, arguments.trials):
        report["ways"][name] = found
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def opened(arguments: argparse.Namespace, folder: Path) -> Session:
    """A session as `heretic run` opens it."""
    assignments = [f"max_response_length={arguments.tokens}"]
    for role in ROLES:
        source = (arguments.assets / "prompts" / f"{role}.txt").resolve()
        wanted = arguments.train if role.endswith("train") else arguments.eval
        assignments += [f"prompts.{role}.source={source}", f"prompts.{role}.split=train[:{wanted}]"]
    options = {"model": str((arguments.assets / arguments.model).resolve()), "runs_dir": str(folder)}
    settings = resolve(None, options, assignments, {}).settings
    inputs = look(settings, force=False, watcher=SILENT)
    run_folder = RunFolder(folder / "run", "benchmark")
    run_folder.create()
    return open_session(settings, inputs.checkpoint, inputs.prompts, inputs.plan, run_folder, SILENT, Stop())


def measure(session: Session, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every way of measuring the same ablations; scores are compared with those of the first, all savings on."""
    together = trials_that_pay(session.ladder)
    print(f"a study would run {together} in a pass (batches of up to {session.bench.batcher.size})")
    texts = session.baseline.refusal_texts
    ways: dict[str, Way] = {
        "one trial in a pass": lambda s: (s.ladder, True, 1),
        "two trials in a pass": lambda s: (s.ladder, True, 2),
        "four trials in a pass": lambda s: (s.ladder, True, 4),
        "one, none of it": lambda s: (s.bench.ladder, False, 1),
        "one, every pass from the first block": lambda s: (without_entries(s.ladder), True, 1),
        "one, no text tried": lambda s: (replace(s.ladder, tried=(), harmful_entries=None), True, 1),
        "one, beginnings for every prompt": lambda s: (without_entries(s.ladder), False, 1),
    }
    ablations = drawn(session, count)
    reference: list[Scores] = []
    for name, way in ways.items():
        ladder, share, in_a_pass = way(replace(session, ladder=with_savings(session.bench.ladder, texts)))
        session.bench.batcher.share = share  # after the ladder: what is kept leaves out what is shared
        session.bench.batcher.size = max(session.bench.batcher.size, in_a_pass * len(ladder.harmful))
        began = time.perf_counter()
        scores = run(session, ladder, ablations, in_a_pass)
        seconds = (time.perf_counter() - began) / len(ablations)
        reference = reference or scores
        apart = max(
            abs(a.divergence.mean - b.divergence.mean) / max(b.divergence.mean, 1e-9)
            for a, b in zip(scores, reference, strict=True)
        )
        same = sum(a.declined == b.declined for a, b in zip(scores, reference, strict=True))
        found = {
            "seconds_per_trial": round(seconds, 2),
            "divergence": round(statistics.mean(s.seconds["divergence"] for s in scores), 2),
            "refusals": round(statistics.mean(s.seconds["refusals"] for s in scores), 2),
            "kl_apart": apart,
            "same_verdicts": f"{same} of {len(scores)}",
        }
        print(f"{name:<40} {found}", flush=True)
        yield name, found


def without_entries(ladder: Ladder) -> Ladder:
    """Every pass goes through all blocks."""
    return replace(ladder, harmful_entries=None, harmless_entries=None)


def drawn(session: Session, count: int) -> list[Ablation]:
    """Random ablations of the search space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), directions=["minimize", "minimize"])
    anatomy = session.bench.language_model.anatomy
    search = session.bench.settings.search
    return [space.sample(study.ask(), search, anatomy.num_layers, anatomy.components) for _ in range(count)]


def run(session: Session, ladder: Ladder, ablations: Sequence[Ablation], in_a_pass: int) -> list[Scores]:
    """Full measurements, so many at a time."""
    scores: list[Scores] = []
    for start in range(0, len(ablations), in_a_pass):
        some = ablations[start : start + in_a_pass]
        with session.applied(*some) as edited:
            found = ladder.score_trials(session.baseline.log_probs, edited)
        scores += [s for s in found if isinstance(s, Scores)]
    return scores


if __name__ == "__main__":
    main()
