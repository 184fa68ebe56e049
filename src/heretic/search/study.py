"""The study: ask Optuna for trials, have them measured, tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from heretic.errors import UserError
from heretic.progress import Watcher
from heretic.scoring.ladder import Measured, Scores, never
from heretic.search.fidelity import BEATEN, Progress, told
from heretic.search.front import AGAIN
from heretic.search.sampler import sampler
from heretic.search.seal import sealed
from heretic.search.standing import Standing
from heretic.search.storage import worker
from heretic.settings import Settings
from heretic.stop import Stop

# An ablation that destroys the model has an infinite KL; TPE needs a number, and any this large is as bad as another.
WORST_KL = 100.0
FAILURES_IN_A_ROW = 3
TOGETHER = "heretic:trials_together"  # user attribute of the study
START = "start"  # user attribute of a trial to begin with: its number among these
KL_PER_PROMPT = "kl_per_prompt"  # user attribute of a trial that was on the front when it was told
MOST_PROMPTS = 2000  # of which it is stored


class Measurer(Protocol):
    """What measures trials."""

    def together(self, before: int | None) -> int:
        """How many trials to hand over at a time; `before` is what this came to in an earlier session."""

    def starts(self) -> Sequence[dict[str, Any]]:
        """Parameters of the trials to begin with, which are measured in full."""

    def draw(self, trial: optuna.Trial) -> object:
        """Draw a trial's parameters; they are stored with it."""

    def measure(
        self, trials: Sequence[optuna.Trial], beaten: Callable[[float, float], bool]
    ) -> list[Measured | UserError]:
        """What came out of each; `beaten(KL, unanswered requests to expect at least)` says that one need not be measured any
        further."""


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
    after_batch: Callable[[], None] = lambda: None,
) -> None:
    """Go on until the study holds `settings.n_trials` finished trials.

    Trials are asked for as many at a time as `trials` runs together, and all stored before the next are asked for. One that
    a finished trial has beaten is left early and told with an estimate; it counts, but is never a result. A trial that is
    interrupted or fails is marked failed and does not count; three that fail one after the other end the study. `after_batch`
    is called when trials have been told. Raises Interrupted, or the last error.
    """
    failures = 0
    _enqueue(study, trials.starts())
    with watcher.stage("Trials", settings.n_trials) as stage:
        stage.advance(finished(study))
        watcher.stands(Standing.of(study, settings))
        while asked := _ask(study, settings, trials, stop):
            try:
                for trial in asked:
                    trial.set_user_attr("worker", worker())
                progress = Progress.of(study)
                in_full = not settings.early_stopping or any(START in trial.user_attrs for trial in asked)
                measured = trials.measure(asked, never if in_full else progress.bar.beaten)
                for trial, found in zip(asked, measured, strict=True):
                    if isinstance(found, UserError):
                        study.tell(trial, state=TrialState.FAIL)
                        failures += 1
                        watcher.warn(f"Trial {trial.number} failed: {found.what}")
                        if failures == FAILURES_IN_A_ROW:
                            raise found
                        continue
                    failures = 0
                    trial.set_user_attr(
                        "scores" if isinstance(found, Scores) else BEATEN, sealed(found.as_dict(), trial.params)
                    )
                    for name, excess in found.excess.items() if isinstance(found, Scores) else ():
                        trial.set_constraint(name, excess)
                    if isinstance(found, Scores) and not progress.bar.beaten(found.divergence.mean, found.expected):
                        trial.set_user_attr(KL_PER_PROMPT, rounded(found.divergence.per_prompt[:MOST_PROMPTS]))
                    study.tell(trial, told(found, progress, settings.search.kl_floor, WORST_KL))
                    stage.advance()
                    watcher.say(f"Trial {trial.number} ({finished(study)} of {settings.n_trials}): {_line(found)}")
            except BaseException:
                for trial in asked:
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                raise
            watcher.stands(Standing.of(study, settings))
            after_batch()


def _enqueue(study: optuna.Study, starts: Sequence[dict[str, Any]]) -> None:
    """Have the trials to begin with asked for next, those that are not yet in the study; a failed one is tried again."""
    known = {t.user_attrs.get(START) for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL}
    for number, params in enumerate(starts):
        if number not in known:
            study.enqueue_trial(params, user_attrs={START: number})


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
    for _ in range(min(_together(study, trials), left)):
        number = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)))
        study.sampler = sampler(settings, number)
        asked.append(study.ask())
        trials.draw(asked[-1])  # at once: what is drawn at random comes from the study's sampler of the moment
    return asked


def _together(study: optuna.Study, trials: Measurer) -> int:
    """How many trials at a time: stored, since what is drawn depends on it, and a resumed study shall draw the same."""
    before = study.user_attrs.get(TOGETHER)
    now = trials.together(before)
    if now != before:
        study.set_user_attr(TOGETHER, now)
    return now


def rounded(numbers: Sequence[float]) -> list[float]:
    """Four digits of each, which is all that a drawing shows."""
    return [float(f"{number:.4g}") for number in numbers]


def _line(found: Measured) -> str:
    """What came out, for the log."""
    kl, seconds = found.divergence.mean, found.seconds.get("trial", 0.0)
    if isinstance(found, Scores):
        evasive = f", {found.evasive} evasive" if found.evasive else ""
        beyond = "".join(
            f", {name.replace('_', '-')} {n:g} over the limit" for name, n in found.excess.items() if n > 0
        )
        return f"{found.refusals} of {found.total} refused, KL {kl:.4f}{evasive}{beyond} ({seconds:.1f} s)"
    return f"beaten, with at least {found.at_least} of {found.total} refused at KL {kl:.4f} ({seconds:.1f} s)"
