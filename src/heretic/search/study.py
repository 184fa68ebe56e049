"""The study: ask Optuna for a trial, measure it, tell."""

from __future__ import annotations

import time
from collections.abc import Callable

import optuna
from optuna.trial import TrialState

from heretic.errors import UserError
from heretic.progress import Watcher
from heretic.scoring.ladder import Scores
from heretic.search.front import Result, result
from heretic.search.storage import worker
from heretic.stop import Stop

# An ablation that destroys the model has an infinite KL; TPE needs a number, and any this large is as bad as another.
WORST_KL = 100.0
FAILURES_IN_A_ROW = 3


def finished(study: optuna.Study) -> int:
    """Number of measured trials."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def optimise(
    study: optuna.Study,
    n_trials: int,
    measure: Callable[[optuna.Trial], Scores],
    *,
    seed: int,
    n_startup_trials: int,
    kl_floor: float,
    watcher: Watcher,
    stop: Stop,
    on_result: Callable[[Result], None] = lambda _: None,
) -> None:
    """Go on until the study holds `n_trials` measured trials.

    Optuna is told a KL of at least `kl_floor`; the measured one is stored beside it.
    Every trial is stored before the next begins. A trial that is interrupted or fails is marked failed and does not count;
    three that fail one after the other end the study. Raises Interrupted, or the last error.
    """
    failures = 0
    with watcher.stage("Trials", n_trials) as stage:
        stage.advance(finished(study))
        while (done := finished(study)) < n_trials:
            stop.check()
            # Seeded by how many trials are done or under way, so that a study that was interrupted draws what an
            # uninterrupted one would have drawn, and workers side by side draw different ones.
            number = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)))
            study.sampler = optuna.samplers.TPESampler(
                seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=n_startup_trials, multivariate=True
            )
            trial = study.ask()
            try:
                trial.set_user_attr("worker", worker())
                began = time.perf_counter()
                scores = measure(trial)
                scores.seconds["trial"] = time.perf_counter() - began
                trial.set_user_attr("scores", scores.as_dict())
                study.tell(trial, [min(max(scores.divergence.mean, kl_floor), WORST_KL), scores.refusals])
            except UserError as error:
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                failures += 1
                watcher.warn(f"Trial {trial.number} failed: {error.what}")
                if failures == FAILURES_IN_A_ROW:
                    raise
                continue
            except BaseException:
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                raise
            failures = 0
            stage.advance()
            found = result(study.get_trials(deepcopy=False)[trial.number])
            watcher.say(
                f"Trial {found.number} ({done + 1} of {n_trials}): {found.scores.refusals} of {found.scores.total} refused, "
                f"KL {found.scores.divergence.mean:.4f} ({found.scores.seconds['trial']:.1f} s)"
            )
            on_result(found)
