"""Read the status of a run from its storage, also while another process works on it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from heretic.errors import UserError
from heretic.files import split_lines
from heretic.hardware import locks
from heretic.hardware.memory_usage import memory_usage
from heretic.runs.folder import DENSE_PATH_STATE, RunFolder, find_run, load_settings
from heretic.search.gradient_path import GradientPath
from heretic.search.integrity import check_attributes, damaged_trials, warning
from heretic.search.pareto import pareto_front
from heretic.search.summary import StudySummary
from heretic.settings import Settings
from heretic.storage.attributes import Signature, settings_of, signature
from heretic.storage.rdb import (
    connect,
    is_alive,
    is_this_host,
    translate_storage_errors,
)
from heretic.storage.retrying import RetryingRDBStorage
from heretic.storage.study_lock import rdb_storage
from heretic.storage.url import masked, on_server, sqlite_file, storage_url, study_name

WARNINGS = 3  # shown, the last ones of the run's log


@dataclass(frozen=True)
class Status:
    """The status of a run."""

    place: str  # the run's folder, or its storage
    model: str
    state: str
    summary: StudySummary
    gradient_path: str  # progress of the gradient search
    memory: dict[str, str] = field(default_factory=dict)  # by device of the machines at work
    latest: str = ""  # last line of the log
    warnings: tuple[str, ...] = ()  # last warnings of the log

    def as_dict(self) -> dict[str, Any]:
        """Return the data for --json."""
        summary = self.summary
        per_hour = summary.trials_per_hour
        return {
            "folder": self.place,
            "model": self.model,
            "state": self.state,
            "n_trials": summary.n_trials,
            "n_complete": summary.n_complete,
            "n_pruned": summary.n_pruned,
            "n_failed": summary.n_failed,
            "ended": summary.end[0] if summary.end else None,
            "convergence": summary.convergence.as_dict() if summary.convergence else None,
            "original_refusals": summary.original_refusals,
            "trials_per_hour": per_hour,
            "seconds_per_trial": 3600 / per_hour if per_hour else None,
            "seconds_left": summary.seconds_left,
            "proxy_error": summary.history.proxy_error,
            "gradient_search": self.gradient_path,
            "memory": self.memory,
            "latest": self.latest,
            "warnings": list(self.warnings),
            "best": summary.best.result.number if summary.best else None,
            "pareto_front": [
                {"trial": r.number, "params": r.params, **r.scores.as_dict()} for r in pareto_front(summary.results)
            ],
        }


def read_status(name: str, runs_dir: str, environment: Mapping[str, str], storage: str = "") -> Status:
    """Return the status of a run by its folder, or by its name in a shared `storage`. Raises UserError."""
    if storage:
        with translate_storage_errors(storage):
            return _status_from_storage(name, storage)
    folder = find_run(name, runs_dir)
    settings = load_settings(folder, environment)
    if not settings.storage and not (folder.path / "study.db").is_file():
        log_lines, _ = _read_log(folder.path / "run.log")
        last_line = f"; last log line: {log_lines[-1]}" if log_lines else ""
        raise UserError(
            "The run has no study yet.",
            code="no-study",
            where=str(folder.path),
            fix=f"wait until its first trial starts{last_line}",
        )
    url = storage_url(settings.storage, folder.path)
    with translate_storage_errors(url):
        study = load_study(url, study_name(settings.storage, folder.path))
        summary, damage_warnings = _summarize(study, settings)
        owner = locks.lock_owner(folder.lock)
        workers = _running_workers(study, settings, any_host=on_server(url))
        state = f"running, held by {owner}" if owner else _state(workers, summary)
        log_lines, log_warnings = _read_log(folder.path / "run.log")
        if owner and owner.host == socket.gethostname():
            memory = {usage.device: str(usage) for usage in memory_usage(owner.pid)}
        else:
            memory = _worker_memory(workers)
        return Status(
            str(folder.path),
            settings.model,
            state,
            summary,
            gradient_path=_gradient_search_progress(study, folder, settings),
            memory=memory,
            latest=log_lines[-1] if log_lines and state.startswith("running") else "",
            warnings=(*log_warnings[-WARNINGS:], *damage_warnings),
        )


def _status_from_storage(name: str, storage: str) -> Status:
    """Return the status of a study from its storage alone."""
    if not name:
        raise UserError(
            "--storage needs the name of a run.",
            code="invalid-option",
            where="--storage",
            fix="run: heretic status NAME --storage URL",
        )
    study = load_study(storage, name)
    settings = settings_of(study)
    if settings is None:
        raise UserError(
            f"The study '{name}' does not contain its settings.",
            code="study-without-settings",
            where=masked(storage),
            fix="continue the run once, or use its folder instead",
        )
    summary, damage_warnings = _summarize(study, settings)
    workers = _running_workers(study, settings, any_host=True)
    return Status(
        masked(storage),
        settings.model,
        _state(workers, summary),
        summary,
        gradient_path=_gradient_search_progress(study, None, settings),
        memory=_worker_memory(workers),
        warnings=damage_warnings,
    )


def _summarize(study: optuna.Study, settings: Settings) -> tuple[StudySummary, tuple[str, ...]]:
    """Return the summary of a study without its damaged trials, and a warning that names these."""
    check_attributes(study)
    damaged = damaged_trials(study)
    return StudySummary.of(study, settings, damaged), (warning(damaged),) if damaged else ()


def load_study(url: str, name: str) -> optuna.Study:
    """Load an existing study from its storage. Raises UserError."""
    file = sqlite_file(url)
    if file and not (file.is_file() and file.stat().st_size):  # connecting would create a database
        raise UserError(
            "The study's database file does not exist or is empty.",
            code="study-not-found",
            where=masked(url),
            fix="check the path",
        )
    try:
        study = optuna.load_study(study_name=name, storage=connect(url))
    except KeyError:
        raise UserError(
            f"The storage has no study '{name}'.",
            code="study-not-found",
            where=masked(url),
            fix="check the run's name",
        ) from None
    return study


def _state(workers: list[Signature], summary: StudySummary) -> str:
    """Return the state of a study from its trials."""
    if processes := sorted({f"process {w['pid']} on {w['host']}" for w in workers}):
        return f"running: {', '.join(processes)}"
    return "complete" if summary.end else "stopped"


def _running_workers(study: optuna.Study, settings: Settings, *, any_host: bool) -> list[Signature]:
    """Return the signatures of the workers with a running trial.

    With `any_host`, workers on other machines count as long as their heartbeats arrive; else only those on this machine.
    """
    storage, stale = rdb_storage(study), set()
    if any_host and isinstance(storage, RetryingRDBStorage):
        storage.configure_heartbeat(settings.workers)
        stale = {*storage._get_stale_trial_ids(study._study_id)}
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    workers = [signature(t) for t in running if t._trial_id not in stale]
    return [w for w in workers if w is not None and is_alive(w) and (any_host or is_this_host(w))]


def _worker_memory(workers: list[Signature]) -> dict[str, str]:
    """Return the memory usage of the workers' devices when their trials started."""
    return {f"{device} of {w['host']}": used for w in workers for device, used in w.get("memory", {}).items()}


def _gradient_search_progress(study: optuna.Study, folder: RunFolder | None, settings: Settings) -> str:
    """Return the progress of the gradient search; empty if there is none."""
    gradient_path = GradientPath.load(study)
    if gradient_path is not None:
        first, last = gradient_path.edited_layer_range
        return gradient_path.failure_reason or f"{len(gradient_path.points)} points, edited layers {first} to {last}"
    if folder is None:
        return ""
    gradient, second = settings.search.gradient, folder.path_steps(DENSE_PATH_STATE)
    steps, planned = second or folder.path_steps(), len(gradient.weights) * gradient.steps
    told = f"step {steps} of {planned}{' and more' * (steps > planned)}" if steps else ""
    return f"second search, {told}" if second else told


def _read_log(log: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return info lines and warnings of a log, whose lines are 'date time LEVEL text', without the level."""
    if not log.is_file():
        return (), ()
    lines = split_lines(log.read_text(encoding="utf-8", errors="replace"))

    def of_level(level: str) -> tuple[str, ...]:
        entries = [line.split(f" {level} ", 1) for line in lines if f" {level} " in line]
        return tuple(f"{time.partition(',')[0]} {text}" for time, text in entries)

    return of_level("INFO"), of_level("WARNING")
