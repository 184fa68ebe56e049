"""Trials on a session: draw their ablations, apply them together, measure each as far as it matters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from heretic.ablation.ablation import Ablation
from heretic.errors import JudgeFailed, UserError, memory_error
from heretic.model.batching import free_memory, out_of_memory
from heretic.scoring.evaluator import TrialOutcome
from heretic.search.space import SearchSpace, foreign_parameters
from heretic.session.caching import tune_trials_per_batch
from heretic.session.session import Session


@dataclass(frozen=True)
class Trials:
    """Measures trials on a session."""

    session: Session
    space: SearchSpace

    def trials_per_batch(self, before: int | None) -> int:
        """How many to run at once: as the settings say; with `trials_per_batch = 0` what an earlier session measured to pay,
        else it is measured now."""
        settings = self.session.context.settings
        if settings.apply == "weights":  # one edit at a time
            return 1
        return settings.trials_per_batch or before or tune_trials_per_batch(self.session.evaluator)

    def measure(
        self, trials: Sequence[optuna.Trial], beaten: Callable[[float, float], bool]
    ) -> list[TrialOutcome | UserError]:
        """Measure these trials in shared passes. `beaten(KL, unanswered requests to expect at least)` ends one that cannot matter
        any more.

        Where they fail together each is measured alone, so that one's failure is not the others'. Raises JudgeFailed, which is the
        failure of none.
        """
        ablations = [self.sample(trial) for trial in trials]
        try:
            return [*self._evaluate_batch(ablations, beaten)]
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
        return [found for trial in trials for found in self.measure([trial], beaten)]

    def sample(self, trial: optuna.Trial | optuna.trial.FixedTrial) -> Ablation:
        """A trial's ablation; what was drawn once stays, and one that is fixed has it all. Raises UserError where the study's
        parameters are of another search space."""
        if isinstance(trial, optuna.trial.FixedTrial):
            return self.space.sample(trial)
        try:
            return self.space.sample(trial)
        except (
            ValueError
        ) as error:  # Optuna's: another trial of the study has a parameter of this name and another kind
            raise foreign_parameters(error) from None

    def initial_params(self) -> list[dict[str, Any]]:
        """Parameters of the trials to begin with."""
        return self.space.initial_params()

    def _evaluate_batch(
        self, ablations: Sequence[Ablation], beaten: Callable[[float, float], bool]
    ) -> list[TrialOutcome]:
        session, log_probs = self.session, self.session.baseline.log_probs
        began = time.perf_counter()
        with session.applied(*ablations) as edited:
            prepared = time.perf_counter() - began
            found = session.evaluator.score_trials(log_probs, edited, beaten)
        for one in found:
            one.seconds["prepare"] = prepared / len(ablations)
            one.seconds["trial"] = (time.perf_counter() - began) / len(ablations)
        return found
