"""Trials on a session: sample their ablations, apply them together, and measure each until it is pruned."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from heretic.ablation.ablation import Ablation
from heretic.errors import JudgeFailed, UserError, memory_error
from heretic.model.batching import free_memory, out_of_memory
from heretic.scoring.scores import TrialOutcome
from heretic.search.space import SearchSpace, foreign_parameters
from heretic.session.caching import tune_trials_per_batch
from heretic.session.session import Session


@dataclass(frozen=True)
class Trials:
    """Measures trials on a session."""

    session: Session
    space: SearchSpace

    def trials_per_batch(self, before: int | None) -> int:
        """Return the number of trials per batch from the settings, else from an earlier session, else measure the fastest."""
        settings = self.session.context.settings
        if settings.apply == "weights":  # one edit at a time
            return 1
        return settings.trials_per_batch or before or tune_trials_per_batch(self.session.evaluator)

    def measure(
        self, trials: Sequence[optuna.Trial], is_dominated: Callable[[float, float], bool]
    ) -> list[TrialOutcome | UserError]:
        """Measure trials in shared forward passes; if a batch fails, measure each trial alone to isolate the failure.

        Args:
            trials: Trials of the study, whose parameters are sampled here.
            is_dominated: Prunes a trial, from its KL and a lower bound of its unanswered requests.

        Raises:
            JudgeFailed: The judge gave no verdict, which is no trial's fault.
        """
        ablations = [self.sample(trial) for trial in trials]
        try:
            return [*self._evaluate_batch(ablations, is_dominated)]
        except JudgeFailed:
            raise
        except UserError as error:
            if len(trials) == 1:
                return [error]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(trials) == 1:
                return [memory_error(error)]
            free_memory()
        return [outcome for trial in trials for outcome in self.measure([trial], is_dominated)]

    def sample(self, trial: optuna.Trial | optuna.trial.FixedTrial) -> Ablation:
        """Return a trial's ablation; keeps sampled parameters. Raises UserError if the study has another search space."""
        if isinstance(trial, optuna.trial.FixedTrial):
            return self.space.sample(trial)
        try:
            return self.space.sample(trial)
        except ValueError as error:  # Optuna's: the study has a parameter of this name and another distribution
            raise foreign_parameters(error) from None

    def initial_params(self) -> list[dict[str, Any]]:
        """Return the parameters of the first trials."""
        return self.space.initial_params()

    def _evaluate_batch(
        self, ablations: Sequence[Ablation], is_dominated: Callable[[float, float], bool]
    ) -> list[TrialOutcome]:
        session, log_probs = self.session, self.session.baseline.log_probs
        began = time.perf_counter()
        with session.applied(*ablations) as edited:
            prepared = time.perf_counter() - began
            outcomes = session.evaluator.score_trials(log_probs, edited, is_dominated)
        for outcome in outcomes:
            outcome.seconds["prepare"] = prepared / len(ablations)
            outcome.seconds["trial"] = (time.perf_counter() - began) / len(ablations)
        return outcomes
