"""The sampler of one trial: TPE, seeded by the trial's place in the study, and kept quick where a study is very long.

TPE reads all finished trials for every new one. What it learns from the thousandth mediocre trial is nothing, but with ten
thousand of them a draw takes a quarter of a second. So beyond `ENOUGH` it is shown the best and the latest ones only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from heretic.settings import Settings

MAX_SHOWN_TRIALS = 300  # finished trials that TPE is shown: half of them the best, half the latest


def sampler(settings: Settings, number: int) -> BaseSampler:
    """For the trial that comes after `number` others, finished or under way.

    Seeded by that, so that a study that was interrupted draws what an uninterrupted one would have drawn, and workers side by
    side draw different ones.
    """
    return BoundedTPESampler(
        TPESampler(
            seed=(settings.seed * 1_000_003 + number) % 2**32,
            n_startup_trials=settings.search.n_startup_trials,
            multivariate=True,
            constant_liar=True,  # what is under way, here or elsewhere, counts as bad: others are drawn apart from it
        )
    )


class BoundedTPESampler(BaseSampler):
    """Another sampler that is shown a bounded part of a study."""

    def __init__(self, inner: BaseSampler, enough: int = MAX_SHOWN_TRIALS) -> None:
        self.inner, self.enough = inner, enough
        self._shown: tuple[int, optuna.Study] | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the inner one does."""
        return self.inner.infer_relative_search_space(self._part(study, trial), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the inner one does."""
        if (part := self._part(study, trial)) is study:
            return self.inner.sample_relative(study, trial, search_space)
        return part.ask(search_space).params if search_space else {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the inner one does."""
        if (part := self._part(study, trial)) is study:
            return self.inner.sample_independent(study, trial, param_name, param_distribution)
        return part.ask({param_name: param_distribution}).params[param_name]

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """As the inner one does."""
        self.inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """As the inner one does."""
        self.inner.after_trial(study, trial, state, values)

    def _part(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        """The study itself, or one in memory with the best and the latest of its trials."""
        known = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        if len(known) <= self.enough:
            return study
        if self._shown is None or self._shown[0] != trial.number:
            part = optuna.create_study(directions=study.directions, sampler=self.inner)
            part.add_trials(
                [_without_attributes(t) for t in relevant_trials(known, self.enough) if t.number != trial.number]
            )
            self._shown = trial.number, part
        return self._shown[1]


def relevant_trials(trials: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """All trials under way, and of the finished ones `enough`: half of them the latest, and of the others the best, by fronts,
    that keep to their constraints."""
    running = [t for t in trials if t.state == TrialState.RUNNING]
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    latest = complete[-(count // 2) :]
    earlier = complete[: len(complete) - len(latest)]
    kept = [t for t in earlier if all(excess <= 0 for excess in t.constraints.values())]
    order = by_pareto_rank(np.array([t.values for t in kept]).reshape(-1, 2), count - len(latest))
    best = [kept[i] for i in order]
    return [*sorted(best, key=lambda t: t.number), *latest, *running]


def by_pareto_rank(values: np.ndarray, count: int) -> list[int]:
    """So many indices of the rows (two values, both to be small): the Pareto front's, then those of the front without these, ..."""
    left = np.lexsort((values[:, 1], values[:, 0]))
    ranked: list[int] = []
    while len(left) and len(ranked) < count:
        second = values[left, 1]
        before = np.minimum.accumulate(np.concatenate(([np.inf], second[:-1])))
        on_front = second < before
        ranked += left[on_front].tolist()
        left = left[~on_front]
    return ranked[:count]


def _without_attributes(trial: FrozenTrial) -> FrozenTrial:
    """What TPE reads of a trial."""
    finished = trial.state == TrialState.COMPLETE
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values if finished else None,
        params=trial.params,
        distributions=trial.distributions,
        constraints=trial.constraints,
    )
