"""The main job, from top to bottom: settings, lock, preflight, model, study, choice, export, proof."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from heretic.errors import BusyError, Interrupted, UserError
from heretic.export.export import Export, earlier_export, plan_export, write_export
from heretic.hardware import locks as lock
from heretic.hardware.gpus import gpus_for, gpus_here
from heretic.interrupt import StopSignal
from heretic.model.distributed import broadcast_from_rank0, size
from heretic.pipeline import tensor_parallel as parallel
from heretic.pipeline.gradient_search import run_gradient_search
from heretic.pipeline.prepare import RunInputs, prepare_run
from heretic.pipeline.run_context import RunContext
from heretic.pipeline.trials import Trials
from heretic.pipeline.worker_process import parent_pid
from heretic.pipeline.workers import launch_workers
from heretic.planning import preflight
from heretic.progress import ProgressReporter
from heretic.report.reporter import live_report
from heretic.runs.folder import RunFolder, log_to
from heretic.runs.metadata import RunMetadata
from heretic.search.integrity import check_study
from heretic.search.pareto import Result, pareto_front
from heretic.search.pruning import StudyHistory
from heretic.search.study import n_complete, run_study
from heretic.search.summary import StudyReporter
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


@dataclass(frozen=True)
class Outcome:
    """What a run came to: all results, the chosen one with the reason, and the export if one was made."""

    folder: RunFolder
    results: list[Result]
    selected: Result | None
    reason: str
    export: Export | None
    original_refusals: int | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "run": str(self.folder.path),
            "trials": len(self.results),
            "before": self.original_refusals,
            "chosen": self.selected.number if self.selected else None,
            "reason": self.reason,
            "front": [
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
    workers: int = 1,
    reporter: StudyReporter,
    stop: StopSignal,
    on_report: Callable[[preflight.PreflightReport], None] = lambda _: None,
    on_finished: Callable[[RunContext], None] | None = None,
) -> Outcome:
    """Do the whole job, or what is left of it; with `add`, so many trials more than there are; with `workers`, the trials in so
    many processes.

    `then` gets the run when the job is done, and after a Ctrl-C, for a user who is asked what is next. Raises UserError and its
    kinds, and Interrupted after a stop that left something undone.
    """
    settings = resolved.settings
    with parallel.leader_scope(), device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        inputs = prepare_run(settings, force=force, judging=True, reporter=reporter, on_report=on_report)
        folder = inputs.folder
        if fresh:
            archive_run(folder, settings, reporter)
        folder.create()
        with (
            open_locked_study(inputs, wait=wait, reporter=reporter, stop=stop) as study,
            RunContext(resolved, inputs, study, reporter, stop) as run_context,
        ):
            if not parent_pid():  # a worker was given its settings
                run_context.save_settings()
            if extra_trials:
                run_context.set_n_trials(n_complete(study) + extra_trials)
            export, cut_short = None, False
            try:
                export = execute(run_context, workers)
            except Interrupted:
                if on_finished is None or not stop.from_keyboard:
                    raise
                cut_short = True  # the exception itself is let go: it would keep the model in memory
            if on_finished is not None:
                on_finished(run_context)
            if cut_short and _undone(run_context):
                raise Interrupted
            picked = run_context.selected()
            return Outcome(
                folder,
                run_context.results,
                picked[0] if picked else None,
                picked[1] if picked else "",
                export,
                run_context.original_refusals,
            )


def _undone(run_context: RunContext) -> bool:
    """Whether trials or the export that the settings ask for are still to be made."""
    return _trials_left(run_context) or bool(
        run_context.settings.save_to and run_context.selected() and not _existing_export(run_context)
    )


def _trials_left(run_context: RunContext) -> bool:
    """Whether trials are still to be measured, the last ones for the front among them."""
    return n_complete(run_context.study) < run_context.settings.n_trials or bool(
        StudyHistory.of(run_context.study).pending_full_evaluations()
    )


def _existing_export(run_context: RunContext) -> Export | None:
    """The export of the chosen trial, if it lies already where the settings want it."""
    picked, settings = run_context.selected(), run_context.settings
    if not picked or not settings.save_to:
        return None
    return earlier_export(Path(settings.save_to), run_context.folder, picked[0].number, settings)


def archive_run(folder: RunFolder, settings: Settings, reporter: ProgressReporter) -> None:
    """Make room for a new run; the old one is kept under another name. Raises UserError where that is not possible."""
    if settings.storage:
        raise UserError(
            "--fresh cannot set aside a study in a shared storage.",
            code="conflicting-options",
            where="--fresh",
            fix="choose another run_name instead",
        )
    if folder.path.exists() and (holder := lock.lock_owner(folder.lock)):
        raise BusyError(
            f"The run is in use by {holder}",
            where=str(folder.path),
            fix="wait until it ends, or choose another run_name",
        )
    if aside := folder.archive():
        reporter.info(f"The earlier run was set aside: {aside}")


def execute(run_context: RunContext, workers: int = 1) -> Export | None:
    """Do what is left of the study, choose, and export."""
    settings, folder, study, reporter = (
        run_context.settings,
        run_context.folder,
        run_context.study,
        run_context.reporter,
    )
    if not run_context.shared:
        for number in fail_abandoned(study):
            reporter.info(f"Trial {number} was cut off in an earlier session; it does not count.")
    done = n_complete(study)
    if done:
        reporter.info(f"Resuming {folder.path}: {done} of {settings.n_trials} trials are done.")
    wanted = Path(settings.save_to) if settings.save_to and not parent_pid() else None
    export = _existing_export(run_context) if wanted else None
    if (export or not wanted) and not _trials_left(run_context):
        reporter.info("The study is complete; nothing is left to do.")
        return export
    if workers > 1 and done < settings.n_trials:
        launch_workers(run_context, workers)
    else:
        run_trials(run_context)
    picked = run_context.selected()
    if not wanted or not picked:
        return None
    if export := _existing_export(run_context):
        reporter.info(f"Trial {picked[0].number} is still the chosen one, and lies in {wanted} already.")
        return export
    return export_once(run_context, picked[0], wanted)


def run_trials(run_context: RunContext) -> None:
    """The missing trials."""
    session = run_context.session()
    run_context.save_original_refusals()
    RunMetadata.from_model(session.context.language_model, session.baseline.refused).save(run_context.study)
    gradient_path = broadcast_from_rank0(
        lambda: run_gradient_search(run_context.study, session, run_context.folder, run_context.compute_once)
    )
    space = session.space(gradient_path)
    trials = Trials(session, space)
    measurer = parallel.RankZeroTrials(trials) if size() > 1 else trials
    with live_report(
        run_context.study, run_context.settings, run_context.folder, run_context.reporter
    ) as report_writer:
        run_study(
            run_context.study,
            run_context.settings,
            measurer,
            reporter=run_context.reporter,
            stop=run_context.stop,
            after_batch=report_writer.after_batch,
            shared=run_context.shared,
        )


def export_once(run_context: RunContext, result: Result, destination: Path) -> Export | None:
    """Export one trial, unless another worker of the study does or has done it."""
    settings = run_context.settings
    kind = {"gguf": f"gguf {settings.gguf_type}", "lora": f"lora {settings.lora_rank}"}.get(settings.export_format, "")
    what = f"{result.number} {kind}".strip()
    with run_context.compute_once.once(
        f"the export of trial {result.number}", lambda: exported(run_context.study, what) is not None
    ):
        if (by := exported(run_context.study, what)) is not None:
            run_context.reporter.info(f"Trial {result.number} was exported by {by}.")
            return None
        export = export_trial(run_context, result, destination)
        if run_context.shared:
            run_context.study.set_user_attr(EXPORTED + what, f"{socket.gethostname()}, in {destination.resolve()}")
        return export


def export_trial(run_context: RunContext, result: Result, destination: Path) -> Export:
    """Export one trial. The model leaves memory for it, since the written one is loaded to prove it."""
    if run_context.loaded is None:
        parallel.release_followers()
    parallel.lead_export(result.params)
    job = plan_export(
        run_context.session(), run_context.inputs.plan, run_context.space, result, run_context.folder, destination
    )
    run_context.unload()
    parallel.release_followers()
    return write_export(job, run_context.reporter, run_context.stop)


@contextmanager
def device_lock(settings: Settings, *, wait: bool, reporter: ProgressReporter, stop: StopSignal) -> Iterator[None]:
    """Hold the locks of the devices that these settings may use. Raises BusyError naming the holder."""
    uuids = [gpu.uuid for gpu in gpus_for(settings.device_map, gpus_here())]

    def say(path: Path, who: lock.LockOwner | None) -> None:
        reporter.info(
            f"Waiting for {path.stem}, held by {f'process {who.pid} ({who.model})' if who else 'another process'}."
        )

    paths = lock.device_locks(uuids)
    with lock.acquire_locks(
        paths, model=settings.model, wait=wait, on_wait=say, while_waiting=stop.check, parent_pid=parent_pid()
    ):
        yield


@contextmanager
def open_locked_study(
    inputs: RunInputs, *, wait: bool, reporter: ProgressReporter, stop: StopSignal
) -> Iterator[optuna.Study]:
    """Hold the run's lock, write its log, and open its study. Raises BusyError and StudyMismatch.

    A study on a server may have many workers, so nobody holds it: there the storage says who does what.
    """
    settings, folder = inputs.settings, inputs.folder
    paths = [] if on_server(settings.storage) else [folder.lock]
    held = lock.acquire_locks(paths, model=settings.model, wait=wait, while_waiting=stop.check, parent_pid=parent_pid())
    with held, logging_to(folder):
        url = storage_url(settings.storage, folder.path)
        patience = RetryPolicy(settings.workers.retry_timeout, reporter, stop)
        try:
            study = open_study(url, study_name(settings.storage, folder.path), inputs.facts, settings.workers, patience)
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
        log.exception("stopped by %s", type(error).__name__) if isinstance(error, Exception) else log.info("stopped")
        raise
    finally:
        logging.getLogger("heretic").removeHandler(handler)
        handler.close()
