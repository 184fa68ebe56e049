"""Worker processes on this machine, one per GPU, started and monitored by the main process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from heretic.errors import Interrupted, UserError
from heretic.files import open_private, split_lines
from heretic.hardware.cpu import usable_cores
from heretic.hardware.devices import KINDS
from heretic.hardware.gpus import Gpu, gpus_here
from heretic.hardware.openmp import THREADS, threads_of_user
from heretic.hardware.processes import ending
from heretic.pipeline.worker_process import PARENT_VARIABLE, POLL_SECONDS
from heretic.settings import Settings

if TYPE_CHECKING:
    from heretic.hardware.devices import Device
    from heretic.pipeline.prepare import RunInputs
    from heretic.pipeline.run_context import RunContext
    from heretic.progress import ProgressReporter

LAST_LINES = 3  # of the log of a worker that crashed
REACTION_SECONDS = 10  # for a worker to end after the second Ctrl-C, and to end when it is killed


@dataclass(frozen=True)
class WorkerCount:
    """Number of worker processes; `fewer`: those for whose GPU the model is too large are left out."""

    number: int = 1
    fewer: bool = False


def resolve_worker_count(option: str, settings: Settings) -> tuple[WorkerCount, str]:
    """Return the number of workers for `auto` or a number, and a warning or "". Raises UserError."""
    gpus = () if settings.device_map == "cpu" else gpus_here()
    if option != "auto" and not re.fullmatch("0*[1-9][0-9]{0,3}", option):
        raise UserError(
            f"Invalid number of workers: {option!r}.",
            code="invalid-option",
            where="--workers",
            fix="use auto, or a number such as 4",
        )
    number = max(1, len(gpus)) if option == "auto" else int(option)
    if gpus and number > len(gpus):
        raise UserError(
            f"{number} workers need {number} GPUs, but only {len(gpus)} can be used.",
            code="too-many-workers",
            where="--workers",
            fix="use --workers auto",
        )
    if number > 1 and gpus and settings.device_map not in ("planned", "auto", "balanced"):
        raise UserError(
            "Each worker uses one GPU of its own, so device_map cannot choose GPUs.",
            code="conflicting-settings",
            where="device_map",
            fix='set device_map = "planned", or omit --workers',
        )
    if option == "auto" and not gpus:
        return WorkerCount(), "No GPU can be used, so there is one worker."
    cores = usable_cores()
    if number > 1 and not gpus:
        warning = f"{number} workers share {cores} cores and the memory, so they are hardly faster than one."
        return WorkerCount(number), warning
    return WorkerCount(number, fewer=option == "auto"), ""


def check_memory(settings: Settings, inputs: RunInputs, gpus: Sequence[Gpu], number: int) -> None:
    """Raise UserError if the model does not fit on each of these GPUs (one per worker) or, without GPUs, `number` times in RAM."""
    from heretic.hardware import host

    if not isinstance(settings.device_map, str):
        return
    if gpus and settings.max_memory:
        raise UserError(
            "Each worker sees only its own GPU, as number 0, so max_memory cannot name GPUs.",
            code="conflicting-settings",
            where="max_memory",
            fix="omit max_memory or --workers",
        )
    if gpus:
        fitting = len(fitting_gpus(settings, inputs, gpus))
        if fitting == len(gpus):
            return
        if fitting:
            what = f"The model fits on only {fitting} of these {len(gpus)} GPUs, and each worker uses one GPU."
            fix = f"--workers {fitting}"
        else:
            what = "The model does not fit on one GPU, and each worker uses one GPU."
            fix = 'omit --workers, and one process uses all GPUs; or quantization = "bnb_4bit", if the model then fits on one'
    else:
        devices = [replace(device, free=device.free // number) for device in host.devices(())]
        settings = settings.model_copy(update={"dtypes": [inputs.plan.dtypes[0]]})
        if _fits(settings, inputs, devices):
            return
        what = f"The model does not fit {number} times into RAM, and each worker loads its own copy."
        fix = "use fewer workers, or omit --workers"
    raise UserError(what, code="too-many-workers", where="--workers", fix=fix)


def fitting_gpus(settings: Settings, inputs: RunInputs, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Return the GPUs on which a worker can run the model."""
    from heretic.hardware import host

    return [gpu for gpu in gpus if _fits(settings, inputs, host.devices((gpu,)))]


def choose_gpus(run_context: RunContext, count: WorkerCount) -> tuple[Gpu, ...]:
    """Return the GPUs of the workers, those with the most free memory; () if they share the cores. Raises UserError."""
    settings, inputs = run_context.settings, run_context.inputs
    found = () if settings.device_map == "cpu" else gpus_here()
    gpus = tuple(sorted(found, key=lambda gpu: -gpu.free)[: count.number])
    if not (count.fewer and gpus) or settings.max_memory:
        check_memory(settings, inputs, gpus, count.number)
        return gpus
    fitting = tuple(fitting_gpus(settings, inputs, gpus))
    if len(fitting) < len(gpus):
        instead = f"there are {len(fitting)} workers" if len(fitting) > 1 else "one process uses all GPUs"
        run_context.reporter.warning(f"The model fits on {len(fitting)} of these {len(gpus)} GPUs alone, so {instead}.")
    return fitting


def _fits(settings: Settings, inputs: RunInputs, devices: Sequence[Device]) -> bool:
    """Return whether a worker with these devices can run the model; `auto` and `balanced` must not move weights to RAM."""
    from heretic.planning.memory_plan import plan_for
    from heretic.planning.workload import Workload

    plan = plan_for(settings, inputs.checkpoint, Workload.of(settings, inputs.prompts.longest), devices)
    return bool(plan.largest_batch_size) and not plan.in_ram


@dataclass
class Worker:
    """A worker process and its log file."""

    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log_tail(self) -> str:
        """The last lines of its log, in one line."""
        lines = [line.strip() for line in split_lines(self.log_file.read_text(encoding="utf-8", errors="replace"))]
        return " ".join([line for line in lines if line][-LAST_LINES:])


def run_in_workers(run_context: RunContext, count: WorkerCount) -> bool:
    """Measure the missing trials in worker processes and report their progress.

    Each worker has one GPU, or a share of the cores. Stopping this process stops them. A worker that crashes is not
    restarted; the others continue.

    Returns:
        False if one process is to run the trials: one worker is asked for, or the model is too large for two of the GPUs.

    Raises:
        Interrupted: A stop was requested.
        UserError: The memory is too small, or all workers ended before the study was complete.
    """
    from heretic.search.scheduler import trials_remain

    if count.number == 1:
        return False
    settings, reporter = run_context.settings, run_context.reporter
    gpus = choose_gpus(run_context, count)
    if count.fewer and len(gpus) < 2:
        return False
    number = len(gpus) or count.number
    workers: list[Worker] = []
    try:
        for i in range(number):
            workers.append(_start(run_context, i, number, gpus[i] if gpus else None))
        reporter.info(f"{number} workers: processes {', '.join(str(w.process.pid) for w in workers)}.")
        _monitor(run_context, workers)
    finally:
        _stop(workers, reporter)
    run_context.stop.check()
    if trials_remain(run_context.study, settings):
        statuses = {w.process.returncode for w in workers}
        if statuses == {Interrupted.exit_status}:
            raise Interrupted
        raise UserError(
            f"All {number} workers ended before the study was complete.",
            code="workers-ended",
            where=str(workers[-1].log_file),
            fix="read the end of this log, fix the cause and run the same command again; nothing finished is lost",
        )
    return True


def _monitor(run_context: RunContext, workers: Sequence[Worker]) -> None:
    """Report progress and crashed workers until all workers have ended or a stop is requested."""
    from heretic.search.scheduler import n_complete
    from heretic.search.summary import StudySummary

    study, settings, reporter = run_context.study, run_context.settings, run_context.reporter
    with reporter.stage("Trials", settings.n_trials) as stage:
        reported = 0
        ended: set[int] = set()
        while len(ended) < len(workers):
            time.sleep(POLL_SECONDS)
            if run_context.stop.requested:
                return
            complete = n_complete(study)
            if complete > reported:
                stage.advance(complete - reported)
                reported = complete
                reporter.study_updated(StudySummary.of(study, settings))
            for i, worker in enumerate(workers):
                if i not in ended and worker.process.poll() is not None:
                    ended.add(i)
                    if worker.process.returncode != 0:
                        tail = worker.log_tail
                        reporter.warning(f"Worker {i} {ending(worker.process.returncode)}{tail and f': {tail}'}")


def _start(run_context: RunContext, index: int, of: int, gpu: Gpu | None) -> Worker:
    """Start a worker on the same run; the storage URL goes through the environment to keep it out of the process list."""
    folder, settings = run_context.folder.path, run_context.settings
    environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
    if settings.storage:
        environment["HERETIC_STORAGE"] = settings.storage
    if gpu is not None:
        environment |= _only(gpu)
    else:
        environment[THREADS] = threads_of_user() or str(max(1, usable_cores() // of))
    log_file = folder / f"worker-{index}.log"
    arguments = ["run", str(folder), "--plain", "--no-menu", "--trials", str(settings.n_trials)]
    with os.fdopen(open_private(log_file, "w"), "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "heretic", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it only through this process, once
        )
    return Worker(process, log_file)


def _only(gpu: Gpu) -> dict[str, str]:
    """Return the environment variable that shows a process only this GPU of those that this process sees."""
    choices = KINDS[gpu.kind].visibility
    if not choices:  # the machine cannot have another one
        return {}
    variable = next((name for name in choices if os.environ.get(name)), choices[0])
    visible = [part for part in os.environ.get(variable, "").split(",") if part]
    entry = visible[gpu.index] if gpu.index < len(visible) else str(gpu.index)
    return {variable: gpu.uuid if KINDS[gpu.kind].in_nvml and gpu.uuid.startswith("GPU-") else entry}


def _stop(workers: Sequence[Worker], reporter: ProgressReporter) -> None:
    """Interrupt the running workers and wait for them; a second Ctrl-C is passed on, and those that do not react are killed."""
    running = [w.process for w in workers if w.process.poll() is None]
    _terminate(running)
    try:
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        try:
            _terminate(running)
            _wait(running, REACTION_SECONDS)
        finally:  # also after a third one
            _kill(workers, reporter)
        raise


def _terminate(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    # Not SIGINT, which processes that a script starts in the background ignore.
    for process in processes:
        process.send_signal(signal.SIGTERM)  # nothing if it has ended


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until all have ended, or for this time."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.1)


def _kill(workers: Sequence[Worker], reporter: ProgressReporter) -> None:
    """Kill the running workers, and name them."""
    running = [w.process for w in workers if w.process.poll() is None]
    for process in running:
        process.kill()
    if running:
        reporter.warning(
            f"Killed {_named(running)}, which did not react. The same command repeats the trial under way."
        )
        _wait(running, REACTION_SECONDS)
    if left := [process for process in running if process.poll() is None]:
        reporter.warning(f"The system has not ended {_named(left)} yet, probably because of a hanging driver or disk.")


def _named(processes: Sequence[subprocess.Popen[bytes]]) -> str:
    return ", ".join(f"process {process.pid}" for process in processes)
