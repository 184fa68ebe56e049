"""What a study has come to, read from its storage alone; works while another process is at it."""

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
from heretic.hardware import locks as lock
from heretic.hardware.memory_usage import memory_usage
from heretic.runs.folder import RunFolder, find_run, load_settings
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

WARNINGS = 3  # the last ones of the run's log


@dataclass(frozen=True)
class Status:
    """A run at a moment. `place` is its folder, or the storage where only that is at hand; `walk` says how far the walk by
    gradient has come; `memory` is that of the machines at work, by device; `latest` and `warnings` are the last lines of the run's
    log."""

    place: str
    model: str
    state: str
    summary: StudySummary
    gradient_path: str
    memory: dict[str, str] = field(default_factory=dict)
    latest: str = ""
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        summary = self.summary
        per_hour = summary.trials_per_hour
        return {
            "folder": self.place,
            "model": self.model,
            "state": self.state,
            "n_trials": summary.n_trials,
            "done": summary.n_complete,
            "stopped": summary.n_pruned,
            "failed": summary.n_failed,
            "before": summary.original_refusals,
            "trials_per_hour": per_hour,
            "seconds_per_trial": 3600 / per_hour if per_hour else None,
            "seconds_left": summary.seconds_left,
            "surrogate_error": summary.history.surrogate_error,
            "walk": self.gradient_path,
            "memory": self.memory,
            "latest": self.latest,
            "warnings": list(self.warnings),
            "best": summary.best[0].number if summary.best else None,
            "front": [
                {"trial": r.number, "params": r.params, **r.scores.as_dict()} for r in pareto_front(summary.results)
            ],
        }


def read_status(name: str, runs_dir: str, environment: Mapping[str, str], storage: str = "") -> Status:
    """The status of a run, by its folder; or by its name in a shared storage, which needs no folder. Raises UserError."""
    if storage:
        with translate_storage_errors(storage):
            return _in_storage(name, storage)
    folder = find_run(name, runs_dir)
    settings = load_settings(folder, environment)
    if not settings.storage and not (folder.path / "study.db").is_file():
        facts, _ = _log(folder.path / "run.log")
        ends = f"; its log ends: {facts[-1]}" if facts else ""
        raise UserError(
            "The run has no study yet.",
            code="no-study",
            where=str(folder.path),
            fix=f"wait until its first trial begins{ends}",
        )
    url = storage_url(settings.storage, folder.path)
    with translate_storage_errors(url):
        study = load_study(url, study_name(settings.storage, folder.path))
        summary, damage = _standing(study, settings)
        holder = lock.lock_owner(folder.lock)
        workers = _workers(study, settings, anywhere=on_server(url))
        state = f"running, held by {holder}" if holder else _state(workers, summary)
        facts, warnings = _log(folder.path / "run.log")
        if holder and holder.host == socket.gethostname():
            memory = {use.device: str(use) for use in memory_usage(holder.pid)}
        else:
            memory = _memory(workers)
        gradient_path, latest = (
            _walk(study, folder, settings),
            facts[-1] if facts and state.startswith("running") else "",
        )
        return Status(
            str(folder.path),
            settings.model,
            state,
            summary,
            gradient_path,
            memory,
            latest,
            (*warnings[-WARNINGS:], *damage),
        )


def _in_storage(name: str, storage: str) -> Status:
    """Of a study that other machines work on: nothing but its storage is looked at."""
    if not name:
        raise UserError(
            "--storage needs the name of a run.",
            code="invalid-option",
            where="--storage",
            fix="heretic status NAME --storage URL",
        )
    study = load_study(storage, name)
    settings = settings_of(study)
    if settings is None:
        raise UserError(
            f"The study '{name}' does not contain its settings.",
            code="study-without-settings",
            where=masked(storage),
            fix="continue the run once, or name its folder instead",
        )
    summary, damage = _standing(study, settings)
    gradient_path, workers = _walk(study, None, settings), _workers(study, settings, anywhere=True)
    state, memory = _state(workers, summary), _memory(workers)
    return Status(masked(storage), settings.model, state, summary, gradient_path, memory, warnings=damage)


def _standing(study: optuna.Study, settings: Settings) -> tuple[StudySummary, tuple[str, ...]]:
    """How a study stands without its damaged trials, and a warning that names these."""
    check_attributes(study)
    damage = damaged_trials(study)
    return StudySummary.of(study, settings, damage), (warning(damage),) if damage else ()


def load_study(url: str, name: str) -> optuna.Study:
    """A study that exists, from its storage. Raises UserError."""
    file = sqlite_file(url)
    if file and not (file.is_file() and file.stat().st_size):  # who only looks makes no database
        raise UserError(
            "The storage's file does not exist or is empty.",
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
    """From the trials alone: who has one under way, else whether all are done."""
    if named := sorted({f"process {w['pid']} on {w['host']}" for w in workers}):
        return f"running: {', '.join(named)}"
    return "complete" if summary.n_complete >= summary.n_trials else "stopped"


def _workers(study: optuna.Study, settings: Settings, *, anywhere: bool) -> list[Signature]:
    """The signatures of those that have a trial under way. `anywhere`: they may be of other machines, which are believed as long as
    the server has heard of them; those of a file are of this one."""
    storage, silent = rdb_storage(study), set()
    if anywhere and isinstance(storage, RetryingRDBStorage):
        storage.configure_heartbeat(settings.workers)
        silent = {*storage._get_stale_trial_ids(study._study_id)}
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    signed = [signature(t) for t in running if t._trial_id not in silent]
    return [who for who in signed if who is not None and is_alive(who) and (anywhere or is_this_host(who))]


def _memory(workers: list[Signature]) -> dict[str, str]:
    """How full the workers' devices were when their trials began."""
    return {f"{device} of {who['host']}": used for who in workers for device, used in who.get("memory", {}).items()}


def _walk(study: optuna.Study, folder: RunFolder | None, settings: Settings) -> str:
    """In a few words; empty where there is none and none is under way."""
    gradient_path = GradientPath.load(study)
    if gradient_path is not None:
        return (
            gradient_path.failure_reason
            or f"{len(gradient_path.points)} points, edited layers {gradient_path.edited_layer_range[0]} to {gradient_path.edited_layer_range[1]}"
        )
    gradient, steps = settings.search.gradient, folder.path_steps() if folder else 0
    planned = len(gradient.weights) * gradient.steps
    return f"step {steps} of {planned}{' and more' * (steps > planned)}" if steps else ""


def _log(log: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A run's facts and its warnings, each with its time, as the log has them: 'date time LEVEL text'."""
    if not log.is_file():
        return (), ()
    lines = split_lines(log.read_text(encoding="utf-8", errors="replace"))

    def of(level: str) -> tuple[str, ...]:
        found = [line.split(f" {level} ", 1) for line in lines if f" {level} " in line]
        return tuple(f"{when.partition(',')[0]} {text}" for when, text in found)

    return of("INFO"), of("WARNING")
