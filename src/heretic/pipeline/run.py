"""The complete run: locks, preflight, model, study, selection, export, verification."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from heretic.errors import BusyError, Interrupted, UserError, plain_line
from heretic.export.export import Export, earlier_export, plan_export, write_export
from heretic.export.formats import FORMATS
from heretic.hardware import locks
from heretic.hardware.gpus import gpus_for, gpus_here
from heretic.interrupt import StopSignal
from heretic.pipeline.gradient_search import run_gradient_search
from heretic.pipeline.prepare import RunInputs, prepare_run
from heretic.pipeline.run_context import RunContext
from heretic.pipeline.session_note import noted_session
from heretic.pipeline.trials import Trials
from heretic.pipeline.worker_process import parent_pid
from heretic.pipeline.workers import WorkerCount, run_in_workers
from heretic.planning import preflight
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets
from heretic.report.reporter import live_report
from heretic.runs.folder import RunFolder, log_to
from heretic.runs.hub_commit import without_commit
from heretic.runs.metadata import RunMetadata, warn_of_other_versions
from heretic.runs.stored_prompts import prompts_of_run
from heretic.scoring.scorers.registry import choose_scorers
from heretic.search.integrity import check_study
from heretic.search.pareto import Result, Selection, pareto_front
from heretic.search.pruning import StudyHistory
from heretic.search.scheduler import n_complete, trials_remain
from heretic.search.study import run_study
from heretic.search.summary import StudyReporter, StudySummary
from heretic.settings import Settings
from heretic.settings.sources import Resolved
from heretic.storage.attributes import EXPORTED, exported
from heretic.storage.rdb import (
    STORAGE_ERRORS,
    fail_abandoned,
    open_study,
    storage_error,
    translate_storage_errors,
)
from heretic.storage.retrying import RetryPolicy
from heretic.storage.url import on_server, storage_url, study_name

log = logging.getLogger(__name__)

ONE_PROCESS = WorkerCount()


@dataclass(frozen=True)
class Outcome:
    """Result of a run: its study, the selected trial with the reason, and the export, if one was made."""

    folder: RunFolder
    summary: StudySummary
    selected: Result | None
    reason: str
    export: Export | None
    meets_limit: bool = True  # whether the selected trial is within the limit of the setting `select`

    @property
    def results(self) -> list[Result]:
        """The fully measured trials."""
        return self.summary.results

    @property
    def original_refusals(self) -> int | None:
        """Number of requests that the original refuses."""
        return self.summary.original_refusals

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "run": str(self.folder.path),
            "trials": len(self.results),
            "ended": self.summary.end[0] if self.summary.end else None,
            "convergence": self.summary.convergence.as_dict() if self.summary.convergence else None,
            "original_refusals": self.original_refusals,
            "selected": self.selected.number if self.selected else None,
            "reason": self.reason,
            "meets_limit": self.meets_limit,
            "pareto_front": [
                {"trial": r.number, "params": r.params, **r.scores.as_dict()} for r in pareto_front(self.results)
            ],
            "export": self.export.as_dict() if self.export else None,
        }


def run(
    resolved: Resolved,
    *,
    fresh: bool = False,
    force: bool = False,
    wait: bool = False,
    extra_trials: int = 0,
    workers: WorkerCount = ONE_PROCESS,
    reporter: StudyReporter,
    stop: StopSignal,
    on_preflight: Callable[[preflight.PreflightReport], None] = lambda _: None,
    on_finished: Callable[[RunContext], None] | None = None,
) -> Outcome:
    """Run a study to its end and export the selected trial; resumes an earlier session.

    Args:
        resolved: The settings with their origins.
        fresh: Archive an earlier run and start a new one.
        force: Start even if the preflight fails.
        wait: Wait for devices and runs that another process holds.
        extra_trials: Trials to add to those already completed, also if the study has converged.
        workers: Number of worker processes.
        reporter: Receives progress and warnings.
        stop: Requests a stop after the current batch.
        on_preflight: Receives the preflight's report.
        on_finished: Receives the open run at its end and after Ctrl-C, for the menu.

    Raises:
        UserError: The run cannot start or continue; also its subclasses.
        Interrupted: A stop left work unfinished.
    """
    resolved = without_commit(resolved) if fresh else resolved
    settings = resolved.settings
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        inputs = prepare_run(
            settings,
            force=force,
            fresh=fresh,
            judging=True,
            reporter=reporter,
            read_prompts=None if fresh else own_prompts(resolved, reporter),
            on_preflight=on_preflight,
        )
        folder = inputs.folder
        if fresh:
            archive_run(folder, settings, reporter)
        folder.create()
        with (
            open_locked_study(inputs, wait=wait, reporter=reporter, stop=stop) as study,
            noted_session(inputs, reporter) as noting,
            RunContext(resolved, inputs, study, noting, stop) as run_context,
        ):
            return _run_study(run_context, extra_trials, workers, on_finished)


def own_prompts(resolved: Resolved, reporter: ProgressReporter) -> Callable[[], PromptSets] | None:
    """Return what reads the prompts from the run's folder, if the settings come from there too."""
    folder = Path(resolved.settings.runs_dir) / resolved.settings.run_name
    if resolved.file != folder / "config.toml":
        return None
    return partial(prompts_of_run, folder, resolved, reporter)


def _run_study(
    run_context: RunContext, extra_trials: int, workers: WorkerCount, on_finished: Callable[[RunContext], None] | None
) -> Outcome:
    """Run the trials, export, and show the menu. Raises Interrupted."""
    if not parent_pid():  # a worker's parent has saved them
        run_context.save_settings()
    if extra_trials:
        run_context.request_trials(n_complete(run_context.study) + extra_trials)
    # 1. Run the trials and export
    export, interrupted = None, False
    try:
        export = execute(run_context, workers)
    except Interrupted:
        if on_finished is None or not run_context.stop.from_keyboard:
            raise
        interrupted = True  # the exception is not stored: it would keep the model in memory
    # 2. Show the menu, and collect the outcome
    if on_finished is not None:
        on_finished(run_context)
    if interrupted and _has_work_left(run_context):
        raise Interrupted
    selected = run_context.selected()
    return Outcome(
        run_context.folder,
        StudySummary.of(run_context.study, run_context.settings),
        selected.result if selected else None,
        selected.reason if selected else "",
        export,
        meets_limit=selected is None or selected.meets_limit,
    )


def _has_work_left(run_context: RunContext) -> bool:
    """Whether trials or the export in the settings are missing."""
    return _trials_left(run_context) or bool(
        run_context.settings.save_to and run_context.selected() and not _existing_export(run_context)
    )


def _trials_left(run_context: RunContext) -> bool:
    """Whether trials are missing, including pending full evaluations of the Pareto front."""
    return trials_remain(run_context.study, run_context.settings) or bool(
        StudyHistory.of(run_context.study).pending_full_evaluations()
    )


def _existing_export(run_context: RunContext) -> Export | None:
    """Return the export of the selected trial if it is already in `save_to`."""
    selected, settings = run_context.selected(), run_context.settings
    if not selected or not settings.save_to:
        return None
    return earlier_export(Path(settings.save_to), run_context.folder, selected.result.number, settings)


def archive_run(folder: RunFolder, settings: Settings, reporter: ProgressReporter) -> None:
    """Rename an earlier run's folder to make room for a new run. Raises UserError if that is impossible."""
    if settings.storage:
        raise UserError(
            "--fresh cannot archive a study in a shared storage.",
            code="conflicting-options",
            where="--fresh",
            fix="choose another run_name instead",
        )
    if folder.path.exists() and (holder := locks.lock_owner(folder.lock)):
        raise BusyError(
            f"The run is in use by {holder}",
            where=str(folder.path),
            fix="wait until it ends, or choose another run_name",
        )
    if archived := folder.archive():
        reporter.info(f"Archived the earlier run: {archived}")


def execute(run_context: RunContext, workers: WorkerCount = ONE_PROCESS) -> Export | None:
    """Run the missing trials, select one, and export it."""
    settings, folder = run_context.settings, run_context.folder
    study, reporter = run_context.study, run_context.reporter
    # 1. Report the state of an earlier session
    if not run_context.shared:
        for number in fail_abandoned(study):
            reporter.info(f"Trial {number} was interrupted in an earlier session and does not count.")
    complete = n_complete(study)
    if complete:
        reporter.info(f"Resuming {folder.path}: {complete} of {settings.n_trials} trials are done.")
    destination = Path(settings.save_to) if settings.save_to and not parent_pid() else None
    export = _existing_export(run_context) if destination else None
    if (export or not destination) and not _trials_left(run_context):
        _, why = StudySummary.of(study, settings).end or ("", "")
        reporter.info(f"The study is complete: {why}; nothing is left to do. More trials: --trials +50")
        _warn_of_limit(run_context, run_context.selected())
        return export
    # 2. Measure the missing trials
    if not parent_pid():
        warn_of_other_versions(study, reporter)
    if not (trials_remain(study, settings) and run_in_workers(run_context, workers)):
        run_trials(run_context)
    # 3. Export the selected trial
    selected = run_context.selected()
    _warn_of_limit(run_context, selected)
    if not destination or not selected:
        return None
    if export := _existing_export(run_context):
        reporter.info(f"Trial {selected.result.number} is still selected and already exported to {destination}.")
        return export
    return export_once(run_context, selected.result, destination)


def _warn_of_limit(run_context: RunContext, selected: Selection | None) -> None:
    if selected and not selected.meets_limit:
        run_context.reporter.warning(
            f"The limit of the setting select is not met. Trial {selected.result.number}: {selected.reason}."
        )


def run_trials(run_context: RunContext) -> None:
    """Run the gradient search and the missing trials in this process."""
    session = run_context.session()
    run_context.save_original_scores()
    RunMetadata.from_model(session.context.language_model, session.baseline.refused).save(run_context.study)
    gradient_path = run_gradient_search(run_context.study, session, run_context.folder, run_context.compute_once)
    trials = Trials(session, session.space(gradient_path))
    with live_report(
        run_context.study, run_context.settings, run_context.folder, run_context.reporter
    ) as report_writer:
        run_study(
            run_context.study,
            run_context.settings,
            trials,
            reporter=run_context.reporter,
            stop=run_context.stop,
            after_batch=report_writer.after_batch,
            shared=run_context.shared,
        )


def export_once(run_context: RunContext, result: Result, destination: Path) -> Export | None:
    """Export one trial, unless another worker of the study exports it."""
    name = run_context.settings.export_format
    options = FORMATS[name].options(run_context.settings)
    key = " ".join(map(str, (result.number, name, *options.values())))
    with run_context.compute_once.once(
        f"the export of trial {result.number}", lambda: exported(run_context.study, key) is not None
    ):
        if (by := exported(run_context.study, key)) is not None:
            run_context.reporter.info(f"Trial {result.number} was exported by {by}.")
            return None
        export = export_trial(run_context, result, destination)
        if run_context.shared:
            run_context.study.set_user_attr(EXPORTED + key, f"{socket.gethostname()}, in {destination.resolve()}")
        return export


def export_trial(run_context: RunContext, result: Result, destination: Path) -> Export:
    """Export one trial; unloads the model, since the written model is loaded to verify it."""
    job = plan_export(
        run_context.session(),
        run_context.inputs.plan,
        run_context.search_space().from_params(result.params),
        result,
        run_context.folder,
        destination,
    )
    run_context.unload()
    return write_export(job, run_context.reporter, run_context.stop)


@contextmanager
def device_lock(settings: Settings, *, wait: bool, reporter: ProgressReporter, stop: StopSignal) -> Iterator[None]:
    """Hold the locks of the devices that the settings may use. Raises BusyError with the owner's name."""
    uuids = [gpu.uuid for gpu in gpus_for(settings.device_map, gpus_here())]

    def report_wait(path: Path, owner: locks.LockOwner | None) -> None:
        name = f"process {owner.pid} ({owner.model})" if owner else "another process"
        reporter.info(f"Waiting for {path.stem}, held by {name}.")

    paths = locks.device_locks(uuids)
    with locks.acquire_locks(
        paths,
        model=settings.model,
        wait=wait,
        on_wait=report_wait,
        while_waiting=stop.check,
        parent_pid=parent_pid(),
        shared=True,
    ):
        yield


@contextmanager
def open_locked_study(
    inputs: RunInputs, *, wait: bool, reporter: ProgressReporter, stop: StopSignal
) -> Iterator[optuna.Study]:
    """Hold the run's lock, write its log, and open its study. Raises BusyError and StudyMismatch.

    A study on a database server has no lock: its workers coordinate through the storage.
    """
    settings, folder = inputs.settings, inputs.folder
    paths = [] if on_server(settings.storage) else [folder.lock]
    run_lock = locks.acquire_locks(
        paths, model=settings.model, wait=wait, while_waiting=stop.check, parent_pid=parent_pid()
    )
    with run_lock, logging_to(folder):
        url = storage_url(settings.storage, folder.path)
        retry_policy = RetryPolicy(settings.workers.retry_timeout, reporter, stop)
        try:
            study = open_study(
                url,
                study_name(settings.storage, folder.path),
                inputs.facts,
                settings.workers,
                retry_policy,
                choose_scorers(settings).objectives,
            )
            with translate_storage_errors(url):
                check_study(study)
            yield study
        except STORAGE_ERRORS as error:
            raise storage_error(url, error) from error


@contextmanager
def logging_to(folder: RunFolder) -> Iterator[None]:
    """Write run.log in the run's folder."""
    handler = log_to(folder.path / "run.log")
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            log.error("stopped: %s", plain_line(" ".join(str(error).splitlines())))
        elif isinstance(error, Exception) and not isinstance(error, Interrupted):
            log.exception("stopped by %s", type(error).__name__)
        else:
            log.info("stopped")
        raise
    finally:
        logging.getLogger("heretic").removeHandler(handler)
        handler.close()
