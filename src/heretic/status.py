"""What a study has come to, read from its storage alone; works while another process is at it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from heretic.errors import UserError
from heretic.machine import lock
from heretic.run_folder import RunFolder, find_run, stored_settings
from heretic.search.fidelity import BEATEN, Progress
from heretic.search.front import Result, front
from heretic.search.storage import REFUSALS_BEFORE, connect, storage_url, study_name
from heretic.search.walk import Walk
from heretic.settings import Settings


@dataclass(frozen=True)
class Status:
    """A study at a moment. `done` trials are told, `stopped` of them early; `surrogate_error` is how far estimates of such trials
    are off, in refusals; `walk` says how far the walk by gradient has come."""

    folder: Path
    model: str
    state: str
    n_trials: int
    done: int
    stopped: int
    failed: int
    before: int | None
    seconds_per_trial: float | None
    surrogate_error: float | None
    walk: str
    found: list[Result]

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the mean of the last trials."""
        left = self.n_trials - self.done
        return left * self.seconds_per_trial if left > 0 and self.seconds_per_trial else None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        shown = [{"trial": r.number, "params": r.params, **r.scores.as_dict()} for r in front(self.found)]
        plain = {k: v for k, v in vars(self).items() if k not in ("found", "folder")}
        return {"folder": str(self.folder), **plain, "seconds_left": self.seconds_left, "front": shown}


def look_at(name: str, runs_dir: str, environment: Mapping[str, str]) -> Status:
    """The status of a run. Raises UserError if there is none."""
    folder = find_run(name, runs_dir)
    settings = stored_settings(folder, environment)
    if not settings.storage and not (folder.path / "study.db").is_file():
        raise UserError("The run has no study yet.", where=str(folder.path), fix="wait until its first trial begins")
    url = storage_url(settings.storage, folder.path)
    try:
        study = optuna.load_study(study_name=study_name(settings.storage, folder.path), storage=connect(url))
    except KeyError:
        raise UserError("The storage does not hold this run's study.", where=str(folder.path)) from None
    trials = study.get_trials(deepcopy=False)
    progress = Progress.of(study)
    found = progress.found
    done = len(found) + len(progress.stopped)
    holder = lock.holder(folder.lock)
    complete = done >= settings.n_trials
    state = f"running, held by {holder}" if holder else "complete" if complete else "stopped"
    spent = [(r.number, r.scores.seconds.get("trial")) for r in found]
    spent += [(t.number, t.user_attrs[BEATEN]["seconds"].get("trial")) for t in progress.stopped]
    recent = [seconds for _, seconds in sorted(spent)[-10:] if seconds is not None]
    return Status(
        folder=folder.path,
        model=settings.model,
        state=state,
        n_trials=settings.n_trials,
        done=done,
        stopped=len(progress.stopped),
        failed=sum(t.state == TrialState.FAIL for t in trials),
        before=study.user_attrs.get(REFUSALS_BEFORE),
        seconds_per_trial=statistics.fmean(recent) if recent else None,
        surrogate_error=progress.surrogate_error,
        walk=_walk(study, folder, settings),
        found=found,
    )


def _walk(study: optuna.Study, folder: RunFolder, settings: Settings) -> str:
    """In a few words; empty where there is none and none is under way."""
    walk = Walk.of(study)
    if walk is not None:
        return walk.why_not or f"{len(walk.points)} points, edited layers {walk.reach[0]} to {walk.reach[1]}"
    gradient, steps = settings.search.gradient, folder.steps_walked()
    return f"step {steps} of {len(gradient.weights) * gradient.steps}" if steps else ""
