"""What a trial costs, with each saving switched on and off in turn, and that the scores stay the same.

    python benchmarks/trial.py ASSETS [--trials 6] [--tokens 32] [--out benchmarks/results/trial.json]

The same random ablations are measured in every way. 100 + 100 direction prompts, 50 + 50 evaluation prompts, float32.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from common import head, opened, options, write

from heretic.ablation.ablation import Ablation
from heretic.scoring.evaluator import TrialEvaluator
from heretic.scoring.scores import Scores
from heretic.session.caching import tune_trials_per_batch
from heretic.session.session import Session, with_baseline

Way = Callable[[Session], tuple[TrialEvaluator, bool, int]]  # ladder, whether beginnings are shared, trials in a pass


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = options(__doc__, "trial.json")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"max_response_length={arguments.tokens}"]
        session, _ = opened(arguments.assets, arguments.model, settings, Path(folder))
        report: dict[str, Any] = head(arguments) | {"ways": {}}
        for name, found in measure(session, arguments.trials):
            report["ways"][name] = found
            write(report, arguments.out)


def measure(session: Session, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every way of measuring the same ablations; scores are compared with those of the first, all savings on."""
    together = tune_trials_per_batch(session.evaluator)
    print(f"a study would run {together} in a pass (batches of up to {session.context.batcher.size})")
    ways: dict[str, Way] = {
        "one trial in a pass": lambda s: (s.evaluator, True, 1),
        "two trials in a pass": lambda s: (s.evaluator, True, 2),
        "four trials in a pass": lambda s: (s.evaluator, True, 4),
        "one, none of it": lambda s: (s.evaluator.without_caches(), False, 1),
        "one, every pass from the first block": lambda s: (without_entries(s.evaluator), True, 1),
        "one, no draft": lambda s: (replace(s.evaluator, drafts=(), harmful_entries=None), True, 1),
        "one, beginnings for every prompt": lambda s: (without_entries(s.evaluator), False, 1),
    }
    ablations = drawn(session, count)
    reference: list[Scores] = []
    for name, way in ways.items():
        evaluator, share, in_a_pass = way(with_baseline(session, session.baseline))
        session.context.batcher.prefix_caching = share  # after the ladder: what is kept leaves out what is shared
        session.context.batcher.size = max(session.context.batcher.size, in_a_pass * len(evaluator.harmful))
        began = time.perf_counter()
        scores = run(session, evaluator, ablations, in_a_pass)
        seconds = (time.perf_counter() - began) / len(ablations)
        reference = reference or scores
        apart = max(
            abs(a.divergence.mean - b.divergence.mean) / max(b.divergence.mean, 1e-9)
            for a, b in zip(scores, reference, strict=True)
        )
        same = sum(a.refused == b.refused for a, b in zip(scores, reference, strict=True))
        found = {
            "seconds_per_trial": round(seconds, 2),
            "divergence": round(statistics.mean(s.seconds["divergence"] for s in scores), 2),
            "refusals": round(statistics.mean(s.seconds["refusals"] for s in scores), 2),
            "kl_apart": apart,
            "same_verdicts": f"{same} of {len(scores)}",
        }
        print(f"{name:<40} {found}", flush=True)
        yield name, found


def without_entries(evaluator: TrialEvaluator) -> TrialEvaluator:
    """Every pass goes through all blocks."""
    return replace(evaluator, harmful_entries=None, harmless_entries=None)


def drawn(session: Session, count: int) -> list[Ablation]:
    """Random ablations of the search space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), directions=["minimize", "minimize"])
    space = session.space(None)
    return [space.sample(study.ask()) for _ in range(count)]


def run(session: Session, evaluator: TrialEvaluator, ablations: Sequence[Ablation], in_a_pass: int) -> list[Scores]:
    """Full measurements, so many at a time."""
    scores: list[Scores] = []
    for start in range(0, len(ablations), in_a_pass):
        some = ablations[start : start + in_a_pass]
        with session.applied(*some) as edited:
            found = evaluator.score_trials(session.baseline.log_probs, edited)
        scores += [s for s in found if isinstance(s, Scores)]
    return scores


if __name__ == "__main__":
    main()
