"""The study: ask Optuna for trials, have them measured, tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from heretic.errors import UserError
from heretic.interrupt import Stop
from heretic.scoring.evaluator import Measured, Scores, never
from heretic.search.pruning import Bar, Progress, told
from heretic.search.scheduler import Drawer, Queue, finished
from heretic.search.summary import Standing, StudyWatcher
from heretic.settings import Settings
from heretic.storage.attributes import BEATEN, ERROR, KL_PER_PROMPT, SCORES, START, WORKER
from heretic.storage.checksum import sealed
from heretic.storage.heartbeat import retry_of, signature, signs_of_life

# An ablation that destroys the model has an infinite KL; TPE needs a number, and any this large is as bad as another.
WORST_KL = 100.0
FAILURES_IN_A_ROW = 3
MOST_PROMPTS = 2000  # of which it is stored


class Measurer(Drawer, Protocol):
    """What draws and measures trials."""

    def starts(self) -> Sequence[dict[str, Any]]:
        """Parameters of the trials to begin with, which are measured in full."""

    def measure(
        self, trials: Sequence[optuna.Trial], beaten: Callable[[float, float], bool]
    ) -> list[Measured | UserError]:
        """What came out of each; `beaten(KL, unanswered requests to expect at least)` says that one need not be measured any
        further."""


def optimise(
    study: optuna.Study,
    settings: Settings,
    trials: Measurer,
    *,
    watcher: StudyWatcher,
    stop: Stop,
    after_batch: Callable[[], None] = lambda: None,
    shared: bool = False,
) -> None:
    """Go on until the study holds `settings.n_trials` finished trials.

    Trials are asked for as many at a time as `trials` runs together, and all stored before the next are asked for. One that
    a finished trial has beaten is left early and told with an estimate; it counts, but is never a result. A trial that is
    interrupted or fails is marked failed and does not count; three that fail one after the other end the study. `after_batch`
    is called when trials have been told. Raises Interrupted, or the last error.

    `shared`: other workers do the same. What they have under way counts as if it were finished, so that there are exactly
    `n_trials` in the end; and this one stays until the others are done too, in case that one dies.
    """
    failures = 0
    queue = Queue(study, settings, trials, watcher, stop, shared)
    queue.begin(trials.starts())
    with watcher.stage("Trials", settings.n_trials) as stage:
        seen = finished(study)
        stage.advance(seen)
        watcher.stands(Standing.of(study, settings))
        while asked := queue.next():
            try:
                progress = Progress.of(study)
                in_full = not settings.early_stopping or any(START in trial.user_attrs for trial in asked)
                with signs_of_life(study, asked):
                    measured = trials.measure(asked, never if in_full else progress.bar.beaten)
                    for trial, found in zip(asked, measured, strict=True):
                        if isinstance(found, UserError):
                            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # it went to another worker
                                trial.set_user_attr(ERROR, found.what)
                            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                            failures += 1
                            watcher.warn(f"Trial {trial.number} failed: {found.what}")
                            if failures == FAILURES_IN_A_ROW:
                                raise found
                            continue
                        failures = 0
                        values = told(found, progress, settings.search.kl_floor, WORST_KL)
                        kept = _keep(study, trials, trial, found, values, progress.bar)
                        if kept is None:
                            watcher.warn(
                                f"Trial {trial.number} went to another worker: this one was silent for too long."
                            )
                            continue
                        done = finished(study)
                        stage.advance(done - seen)  # with those of other workers
                        seen = done
                        watcher.say(f"Trial {kept.number} ({done} of {settings.n_trials}): {_line(found)}")
            except BaseException:
                for trial in asked:
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                raise
            watcher.stands(Standing.of(study, settings))
            after_batch()


def _keep(
    study: optuna.Study,
    trials: Measurer,
    trial: optuna.Trial,
    found: Measured,
    values: list[float],
    bar: Bar,
) -> optuna.Trial | None:
    """Store what was measured; the trial that holds it, or None where it cannot count any more.

    A worker that was not heard of for too long has lost its trial. What it measured is stored as the repetition of that trial
    if nobody has begun with it; else it is let go, since the same parameters would count twice.
    """

    def store(where: optuna.Trial) -> None:
        kind = SCORES if isinstance(found, Scores) else BEATEN
        where.set_user_attr(kind, sealed(found.as_dict(), where.params))
        for name, excess in found.excess.items() if isinstance(found, Scores) else ():
            where.set_constraint(name, excess)
        if isinstance(found, Scores) and not bar.beaten(found.divergence.mean, found.expected):
            where.set_user_attr(KL_PER_PROMPT, rounded(found.divergence.per_prompt[:MOST_PROMPTS]))
        study.tell(where, values)

    try:
        store(trial)
        return trial
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        if study.get_trials(deepcopy=False)[trial.number].state != TrialState.FAIL:
            raise
    again = retry_of(study, trial.number)
    if again is not None:
        again.set_user_attr(WORKER, signature())
        trials.draw(again)
        store(again)
    return again


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
