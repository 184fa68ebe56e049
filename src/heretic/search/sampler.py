"""TPE sampler of one trial, seeded by the trial's number and bounded in long studies.

TPE reads all finished trials for every new one: with ten thousand of them a sample takes a quarter of a second. Above
`MAX_SHOWN_TRIALS` it reads only the best and the latest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from heretic.settings import Settings

MAX_SHOWN_TRIALS = 300  # finished trials that TPE reads: half of them the best, half the latest


def sampler(settings: Settings, number: int) -> BaseSampler:
    """Create the sampler of the trial that follows `number` finished or running trials.

    The number is part of the seed: a resumed study samples what an uninterrupted one would have sampled, and parallel
    workers sample different trials.
    """
    return BoundedTPESampler(
        TPESampler(
            seed=(settings.seed * 1_000_003 + number) % 2**32,
            n_startup_trials=settings.search.n_startup_trials,
            multivariate=True,
            constant_liar=True,  # running trials count as bad, so that new ones keep away from them
        )
    )


class BoundedTPESampler(BaseSampler):
    """Wraps a sampler and shows it a bounded part of the study."""

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
        """Return the study, or an in-memory study with its best and latest trials; for each trial it is chosen once."""
        if self._shown is None or self._shown[0] != trial.number:
            self._shown = trial.number, self._choose_part(study, trial)
        return self._shown[1]

    def _choose_part(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        known = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        if len(known) <= self.enough:
            return study
        part = optuna.create_study(directions=study.directions, sampler=self.inner)
        part.add_trials(
            _without_attributes(t)
            for t in relevant_trials(known, self.enough, study.directions)
            if t.number != trial.number
        )
        return part


def relevant_trials(
    trials: Sequence[FrozenTrial], count: int, directions: Sequence[StudyDirection]
) -> list[FrozenTrial]:
    """Return all running trials and `count` finished ones: the latest half, then the best feasible ones by Pareto rank."""
    running = [t for t in trials if t.state == TrialState.RUNNING]
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    latest = complete[-(count // 2) :]
    earlier = complete[: len(complete) - len(latest)]
    feasible = [t for t in earlier if all(excess <= 0 for excess in t.constraints.values())]
    signs = np.array([-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions])
    losses = np.array([t.values for t in feasible]).reshape(-1, len(signs)) * signs
    order = by_pareto_rank(losses, count - len(latest))
    best = [feasible[i] for i in order]
    return [*sorted(best, key=lambda t: t.number), *latest, *running]


def by_pareto_rank(losses: np.ndarray, count: int) -> list[int]:
    """Return `count` row indices of minimized objectives [rows, objectives], in the order of their Pareto rank."""
    remaining = np.lexsort(losses.T[::-1])
    ranked: list[int] = []
    while len(remaining) and len(ranked) < count:
        on_front = _non_dominated(losses[remaining])
        ranked += remaining[on_front].tolist()
        remaining = remaining[~on_front]
    return ranked[:count]


def _non_dominated(losses: np.ndarray) -> np.ndarray:
    """Return which rows no other row equals or beats everywhere [rows]; the rows are sorted, and the first of equal ones counts."""
    if losses.shape[1] == 2:
        before = np.minimum.accumulate(np.concatenate(([np.inf], losses[:-1, 1])))
        return losses[:, 1] < before
    on_front = np.ones(len(losses), dtype=bool)
    for i in range(len(losses)):  # only an earlier row can dominate a later one
        rivals = losses[:i][on_front[:i]]
        on_front[i] = not (rivals <= losses[i]).all(axis=1).any()
    return on_front


def _without_attributes(trial: FrozenTrial) -> FrozenTrial:
    """Copy only what TPE reads of a trial."""
    finished = trial.state == TrialState.COMPLETE
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values if finished else None,
        params=trial.params,
        distributions=trial.distributions,
        constraints=trial.constraints,
    )
