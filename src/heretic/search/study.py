"""The study: ask Optuna for trials, have them measured, tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import optuna
from optuna.trial import TrialState

from heretic.errors import UserError
from heretic.progress import Watcher
from heretic.scoring.ladder import Measured, Scores, never
from heretic.search.fidelity import BEATEN, Progress, told
from heretic.search.front import AGAIN, Result, result
from heretic.search.storage import worker
from heretic.settings import Settings
from heretic.stop import Stop

# An ablation that destroys the model has an infinite KL; TPE needs a number, and any this large is as bad as another.
WORST_KL = 100.0
FAILURES_IN_A_ROW = 3


class Measurer(Protocol):
    """What measures trials."""

    @property
    def together(self) -> int:
        """How many trials to hand over at a time."""

    def draw(self, trial: optuna.Trial) -> object:
        """Draw a trial's parameters; they are stored with it."""

    def measure(
        self, trials: Sequence[optuna.Trial], beaten: Callable[[float, int], bool]
    ) -> list[Measured | UserError]:
        """What came out of each; `beaten(KL, refusals found so far)` says that one need not be measured any further."""


def finished(study: optuna.Study) -> int:
    """Number of trials that are told."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def optimise(
    study: optuna.Study,
    settings: Settings,
    trials: Measurer,
    *,
    watcher: Watcher,
    stop: Stop,
    on_result: Callable[[Result], None] = lambda _: None,
) -> None:
    """Go on until the study holds `settings.n_trials` finished trials.

    Trials are asked for as many at a time as `trials` runs together, and all stored before the next are asked for. One that
    a finished trial has beaten is left early and told with an estimate; it counts, but is never a result. A trial that is
    interrupted or fails is marked failed and does not count; three that fail one after the other end the study. Raises
    Interrupted, or the last error.
    """
    failures = 0
    with watcher.stage("Trials", settings.n_trials) as stage:
        stage.advance(finished(study))
        while asked := _ask(study, settings, trials, stop):
            try:
                for trial in asked:
                    trial.set_user_attr("worker", worker())
                progress = Progress.of(study)
                measured = trials.measure(asked, progress.bar.beaten if settings.early_stopping else never)
                for trial, found in zip(asked, measured, strict=True):
                    if isinstance(found, UserError):
                        study.tell(trial, state=TrialState.FAIL)
                        failures += 1
                        watcher.warn(f"Trial {trial.number} failed: {found.what}")
                        if failures == FAILURES_IN_A_ROW:
                            raise found
                        continue
                    failures = 0
                    trial.set_user_attr("scores" if isinstance(found, Scores) else BEATEN, found.as_dict())
                    study.tell(trial, told(found, progress, settings.search.kl_floor, WORST_KL))
                    stage.advance()
                    watcher.say(f"Trial {trial.number} ({finished(study)} of {settings.n_trials}): {_line(found)}")
                    if isinstance(found, Scores):
                        on_result(result(study.get_trials(deepcopy=False)[trial.number]))
            except BaseException:
                for trial in asked:
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                raise


def _ask(study: optuna.Study, settings: Settings, trials: Measurer, stop: Stop) -> list[optuna.Trial]:
    """The next trials; once all are finished, one that was told with an estimate good enough for the front; then none."""
    stop.check()
    left = settings.n_trials - finished(study)
    if left <= 0:
        for unsettled in Progress.of(study).unsettled()[:1]:
            study.enqueue_trial(unsettled.params, user_attrs={AGAIN: unsettled.number})
            return [study.ask()]
        return []
    asked = []
    for _ in range(min(trials.together, left)):
        # Seeded by how many trials are done or under way, so that a study that was interrupted draws what an
        # uninterrupted one would have drawn, and workers side by side draw different ones.
        number = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)))
        study.sampler = optuna.samplers.TPESampler(
            seed=(settings.seed * 1_000_003 + number) % 2**32,
            n_startup_trials=settings.search.n_startup_trials,
            multivariate=True,
            constant_liar=True,  # what is under way, here or elsewhere, counts as bad: others are drawn apart from it
        )
        asked.append(study.ask())
        trials.draw(asked[-1])  # at once: what is drawn at random comes from the study's sampler of the moment
    return asked


def _line(found: Measured) -> str:
    """What came out, for the log."""
    kl, seconds = found.divergence.mean, found.seconds.get("trial", 0.0)
    if isinstance(found, Scores):
        return f"{found.refusals} of {found.total} refused, KL {kl:.4f} ({seconds:.1f} s)"
    return f"beaten, with at least {found.at_least} of {found.total} refused at KL {kl:.4f} ({seconds:.1f} s)"
