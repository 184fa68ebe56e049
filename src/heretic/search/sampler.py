"""TPE sampler of one trial, seeded by the trial's number."""

from __future__ import annotations

from optuna.samplers import TPESampler

from heretic.settings import Settings


def sampler(settings: Settings, number: int) -> TPESampler:
    """Create the sampler of the trial that follows `number` finished or running trials.

    The number is part of the seed: a resumed study samples what an uninterrupted one would have sampled, and parallel
    workers sample different trials.
    """
    return TPESampler(
        seed=(settings.seed * 1_000_003 + number) % 2**32,
        n_startup_trials=settings.search.n_startup_trials,
        multivariate=True,
        constant_liar=True,  # running trials count as bad, so that new ones keep away from them
    )
