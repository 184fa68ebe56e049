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
from heretic.interrupt import Stop
from heretic.model.distributed import agree, size
from heretic.pipeline import tensor_parallel as parallel
from heretic.pipeline.gradient_search import find_walk
from heretic.pipeline.prepare import Inputs, look
from heretic.pipeline.run_context import Desk
from heretic.pipeline.trials import Trials
from heretic.pipeline.worker_process import lender
from heretic.pipeline.workers import send_out
from heretic.planning import preflight
from heretic.progress import Watcher
from heretic.report.reporter import reporting
from heretic.runs.folder import RunFolder, log_to
from heretic.runs.metadata import About
from heretic.search.integrity import check_study
from heretic.search.pareto import Result, front
from heretic.search.pruning import Progress
from heretic.search.study import finished, optimise
from heretic.search.summary import StudyWatcher
from heretic.settings import Settings
from heretic.settings.sources import Resolved
from heretic.storage.attributes import EXPORTED, exported
from heretic.storage.rdb import (
    STORAGE_ERRORS,
    fail_abandoned,
    open_study,
    reading,
    unwritable,
)
from heretic.storage.retrying import Patience
from heretic.storage.url import on_server, storage_url, study_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run came to: all results, the chosen one with the reason, and the export if one was made."""

    folder: RunFolder
    found: list[Result]
    chosen: Result | None
    reason: str
    export: Export | None
    before: int | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "run": str(self.folder.path),
            "trials": len(self.found),
            "before": self.before,
            "chosen": self.chosen.number if self.chosen else None,
            "reason": self.reason,
            "front": [{"trial": r.number, "params": r.params, **r.scores.as_dict()} for r in front(self.found)],
            "export": self.export.as_dict() if self.export else None,
        }


def run(
    resolved: Resolved,
    *,
    fresh: bool = False,
    force: bool = False,
    wait: bool = False,
    add: int = 0,
    workers: int = 1,
    watcher: StudyWatcher,
    stop: Stop,
    on_report: Callable[[preflight.Report], None] = lambda _: None,
    then: Callable[[Desk], None] | None = None,
) -> Outcome:
    """Do the whole job, or what is left of it; with `add`, so many trials more than there are; with `workers`, the trials in so
    many processes.

    `then` gets the run when the job is done, and after a Ctrl-C, for a user who is asked what is next. Raises UserError and its
    kinds, and Interrupted after a stop that left something undone.
    """
    settings = resolved.settings
    with parallel.leading(), device_lock(settings, wait=wait, watcher=watcher, stop=stop):
        inputs = look(settings, force=force, judging=True, watcher=watcher, on_report=on_report)
        folder = inputs.folder
        if fresh:
            set_aside(folder, settings, watcher)
        folder.create()
        with (
            study_of(inputs, wait=wait, watcher=watcher, stop=stop) as study,
            Desk(resolved, inputs, study, watcher, stop) as desk,
        ):
            if not lender():  # a worker was given its settings
                desk.keep_settings()
            if add:
                desk.ask_for(finished(study) + add)
            export, cut_short = None, False
            try:
                export = work(desk, workers)
            except Interrupted:
                if then is None or not stop.at_keyboard:
                    raise
                cut_short = True  # the exception itself is let go: it would keep the model in memory
            if then is not None:
                then(desk)
            if cut_short and _undone(desk):
                raise Interrupted
            picked = desk.picked()
            return Outcome(
                folder, desk.found, picked[0] if picked else None, picked[1] if picked else "", export, desk.before
            )


def _undone(desk: Desk) -> bool:
    """Whether trials or the export that the settings ask for are still to be made."""
    return _trials_left(desk) or bool(desk.settings.save_to and desk.picked() and not _written(desk))


def _trials_left(desk: Desk) -> bool:
    """Whether trials are still to be measured, the last ones for the front among them."""
    return finished(desk.study) < desk.settings.n_trials or bool(Progress.of(desk.study).unsettled())


def _written(desk: Desk) -> Export | None:
    """The export of the chosen trial, if it lies already where the settings want it."""
    picked, settings = desk.picked(), desk.settings
    if not picked or not settings.save_to:
        return None
    return earlier_export(Path(settings.save_to), desk.folder, picked[0].number, settings)


def set_aside(folder: RunFolder, settings: Settings, watcher: Watcher) -> None:
    """Make room for a new run; the old one is kept under another name. Raises UserError where that is not possible."""
    if settings.storage:
        raise UserError(
            "--fresh cannot set aside a study in a shared storage.",
            code="conflicting-options",
            where="--fresh",
            fix="choose another run_name instead",
        )
    if folder.path.exists() and (holder := lock.holder(folder.lock)):
        raise BusyError(
            f"The run is in use by {holder}",
            where=str(folder.path),
            fix="wait until it ends, or choose another run_name",
        )
    if aside := folder.set_aside():
        watcher.say(f"The earlier run was set aside: {aside}")


def work(desk: Desk, workers: int = 1) -> Export | None:
    """Do what is left of the study, choose, and export."""
    settings, folder, study, watcher = desk.settings, desk.folder, desk.study, desk.watcher
    if not desk.shared:
        for number in fail_abandoned(study):
            watcher.say(f"Trial {number} was cut off in an earlier session; it does not count.")
    done = finished(study)
    if done:
        watcher.say(f"Resuming {folder.path}: {done} of {settings.n_trials} trials are done.")
    wanted = Path(settings.save_to) if settings.save_to and not lender() else None
    export = _written(desk) if wanted else None
    if (export or not wanted) and not _trials_left(desk):
        watcher.say("The study is complete; nothing is left to do.")
        return export
    if workers > 1 and done < settings.n_trials:
        send_out(desk, workers)
    else:
        go_on(desk)
    picked = desk.picked()
    if not wanted or not picked:
        return None
    if export := _written(desk):
        watcher.say(f"Trial {picked[0].number} is still the chosen one, and lies in {wanted} already.")
        return export
    return write_once(desk, picked[0], wanted)


def go_on(desk: Desk) -> None:
    """The missing trials."""
    session = desk.session()
    desk.keep_before()
    About.measured(session.bench.language_model, session.baseline.declined).keep(desk.study)
    walk = agree(lambda: find_walk(desk.study, session, desk.folder, desk.shelf))
    space = session.space(walk)
    trials = Trials(session, space)
    measurer = parallel.Led(trials) if size() > 1 else trials
    with reporting(desk.study, desk.settings, desk.folder, desk.watcher) as reporter:
        optimise(
            desk.study,
            desk.settings,
            measurer,
            watcher=desk.watcher,
            stop=desk.stop,
            after_batch=reporter.after_batch,
            shared=desk.shared,
        )


def write_once(desk: Desk, result: Result, destination: Path) -> Export | None:
    """Export one trial, unless another worker of the study does or has done it."""
    settings = desk.settings
    kind = {"gguf": f"gguf {settings.gguf_type}", "lora": f"lora {settings.lora_rank}"}.get(settings.export_format, "")
    what = f"{result.number} {kind}".strip()
    with desk.shelf.thing(f"the export of trial {result.number}", lambda: exported(desk.study, what) is not None):
        if (by := exported(desk.study, what)) is not None:
            desk.watcher.say(f"Trial {result.number} was exported by {by}.")
            return None
        export = write(desk, result, destination)
        if desk.shared:
            desk.study.set_user_attr(EXPORTED + what, f"{socket.gethostname()}, in {destination.resolve()}")
        return export


def write(desk: Desk, result: Result, destination: Path) -> Export:
    """Export one trial. The model leaves memory for it, since the written one is loaded to prove it."""
    if desk.loaded is None:
        parallel.let_go()
    parallel.lead_export(result.params)
    job = plan_export(desk.session(), desk.inputs.plan, desk.space, result, desk.folder, destination)
    desk.put_away()
    parallel.let_go()
    return write_export(job, desk.watcher, desk.stop)


@contextmanager
def device_lock(settings: Settings, *, wait: bool, watcher: Watcher, stop: Stop) -> Iterator[None]:
    """Hold the locks of the devices that these settings may use. Raises BusyError naming the holder."""
    uuids = [gpu.uuid for gpu in gpus_for(settings.device_map, gpus_here())]

    def say(path: Path, who: lock.Holder | None) -> None:
        watcher.say(
            f"Waiting for {path.stem}, held by {f'process {who.pid} ({who.model})' if who else 'another process'}."
        )

    paths = lock.device_locks(uuids)
    with lock.hold(paths, model=settings.model, wait=wait, on_wait=say, while_waiting=stop.check, lender=lender()):
        yield


@contextmanager
def study_of(inputs: Inputs, *, wait: bool, watcher: Watcher, stop: Stop) -> Iterator[optuna.Study]:
    """Hold the run's lock, write its log, and open its study. Raises BusyError and StudyMismatch.

    A study on a server may have many workers, so nobody holds it: there the storage says who does what.
    """
    settings, folder = inputs.settings, inputs.folder
    paths = [] if on_server(settings.storage) else [folder.lock]
    held = lock.hold(paths, model=settings.model, wait=wait, while_waiting=stop.check, lender=lender())
    with held, logging_to(folder):
        url = storage_url(settings.storage, folder.path)
        patience = Patience(settings.workers.patience, watcher, stop)
        try:
            study = open_study(url, study_name(settings.storage, folder.path), inputs.facts, settings.workers, patience)
            with reading(url):
                check_study(study)
            yield study
        except STORAGE_ERRORS as error:
            raise unwritable(url, error) from error


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
