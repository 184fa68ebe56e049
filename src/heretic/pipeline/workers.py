"""Several processes on one study on this machine: one a GPU, started and watched by the one that the user started."""

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
from heretic.hardware.gpus import Gpu, gpus_here
from heretic.pipeline.worker_process import PARENT_VARIABLE, POLL_SECONDS
from heretic.settings import Settings

if TYPE_CHECKING:
    from heretic.pipeline.prepare import RunInputs
    from heretic.pipeline.run_context import RunContext

LAST_LINES = 3  # of what a worker said before it died


def resolve_worker_count(wanted: str, settings: Settings) -> tuple[int, str]:
    """The number of workers that `auto` or a number stands for, and what there is to say about it. Raises UserError."""
    gpus = () if settings.device_map == "cpu" else gpus_here()
    if wanted != "auto" and not re.fullmatch("0*[1-9][0-9]{0,3}", wanted):
        raise UserError(
            f"Invalid number of workers: {wanted!r}.",
            code="invalid-option",
            where="--workers",
            fix="auto, or a number such as 4",
        )
    number = max(1, len(gpus)) if wanted == "auto" else int(wanted)
    if gpus and number > len(gpus):
        raise UserError(
            f"{number} workers need {number} GPUs, but only {len(gpus)} can be used.",
            code="too-many-workers",
            where="--workers",
            fix="--workers auto",
        )
    if number > 1 and gpus and settings.device_map not in ("planned", "auto", "balanced"):
        raise UserError(
            "Each worker uses one GPU of its own, so device_map cannot choose GPUs.",
            code="conflicting-settings",
            where="device_map",
            fix='device_map = "planned", or leave --workers out',
        )
    if wanted == "auto" and not gpus:
        return 1, "No GPU can be used, so there is one worker."
    cores = os.cpu_count() or 1
    if number > 1 and not gpus:
        return number, f"{number} workers share {cores} cores and the memory: they are hardly faster than one."
    return number, ""


def check_memory(settings: Settings, inputs: RunInputs, gpus: Sequence[Gpu], number: int) -> None:
    """Raises UserError for a model that does not fit on every one of these GPUs, of which each worker has one of its own; or,
    without GPUs, not so many times into the RAM."""
    from heretic.hardware import host
    from heretic.planning.memory_plan import plan_for
    from heretic.planning.workload import Workload

    if not isinstance(settings.device_map, str):
        return
    if gpus and settings.max_memory:
        raise UserError(
            "Each worker sees only its own GPU, as number 0, so max_memory cannot name GPUs.",
            code="conflicting-settings",
            where="max_memory",
            fix="leave out max_memory or --workers",
        )
    work = Workload.of(settings, inputs.prompts.longest)
    if gpus:
        devices = host.devices((min(gpus, key=lambda gpu: gpu.free),))
        what = "The model does not fit on one GPU, and each worker uses one GPU."
        fix = (
            f"leave --workers out (one GPU computes at a time); or torchrun --nproc-per-node {len(gpus)} -m heretic run … (all "
            'compute, without the walk); or quantization = "bnb_4bit", if preflight says that it then fits on one'
        )
    else:
        devices = [replace(device, free=device.free // number) for device in host.devices(())]
        settings = settings.model_copy(update={"dtypes": [inputs.plan.dtypes[0]]})
        what = f"The model does not fit {number} times into RAM, and each worker loads its own copy."
        fix = "use fewer workers, or leave --workers out"
    if not plan_for(settings, inputs.checkpoint, work, devices).largest_batch_size:
        raise UserError(what, code="too-many-workers", where="--workers", fix=fix)


@dataclass
class Worker:
    """A started process, and the file that holds what it says."""

    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log_tail(self) -> str:
        """The last lines that it wrote."""
        lines = [line.strip() for line in split_lines(self.log_file.read_text(encoding="utf-8", errors="replace"))]
        return " ".join([line for line in lines if line][-LAST_LINES:])


def launch_workers(run_context: RunContext, number: int) -> None:
    """Have the missing trials measured by so many processes, and show how they get on.

    Each has one GPU of ours, or a share of the cores. What stops this process stops them. One that dies is not started again:
    the others go on. Raises Interrupted, and UserError if the study is not complete when the last one has ended.
    """
    from heretic.search.scheduler import n_complete
    from heretic.search.summary import StudySummary

    study, settings, reporter = run_context.study, run_context.settings, run_context.reporter
    gpus = () if settings.device_map == "cpu" else gpus_here()
    gpus = tuple(sorted(gpus, key=lambda gpu: -gpu.free)[:number])  # the emptiest
    check_memory(settings, run_context.inputs, gpus, number)
    workers = [_start(run_context, i, number, gpus[i] if gpus else None) for i in range(number)]
    reporter.info(f"{number} workers: processes {', '.join(str(w.process.pid) for w in workers)}.")
    try:
        with reporter.stage("Trials", settings.n_trials) as stage:
            done = 0
            gone: set[int] = set()
            while len(gone) < number:
                time.sleep(POLL_SECONDS)
                if run_context.stop.requested:
                    break
                now = n_complete(study)
                if now > done:
                    stage.advance(now - done)
                    done = now
                    reporter.study_updated(StudySummary.of(study, settings))
                for i, worker in enumerate(workers):
                    if i not in gone and worker.process.poll() is not None:
                        gone.add(i)
                        if worker.process.returncode != 0:
                            reporter.warning(
                                f"Worker {i} ended with status {worker.process.returncode}: {worker.log_tail}"
                            )
    finally:
        _end(workers)
    run_context.stop.check()
    if n_complete(study) < settings.n_trials:
        statuses = {w.process.returncode for w in workers}
        if statuses == {Interrupted.exit_status}:
            raise Interrupted
        raise UserError(
            f"All {number} workers ended before the study was complete.",
            code="workers-ended",
            where=str(workers[-1].log_file),
            fix="read the end of this log, fix the cause and run the same command again; nothing finished is lost",
        )


def _start(run_context: RunContext, index: int, of: int, gpu: Gpu | None) -> Worker:
    """One worker: the same run, told by environment what must not be seen among processes."""
    folder, settings = run_context.folder.path, run_context.settings
    environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
    if settings.storage:
        environment["HERETIC_STORAGE"] = settings.storage
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu.uuid if gpu.uuid.startswith("GPU-") else _visible(gpu.index)
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // of))
    said = folder / f"worker-{index}.log"
    arguments = ["run", str(folder), "--plain", "--no-menu", "--trials", str(settings.n_trials)]
    with os.fdopen(open_private(said, "w"), "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "heretic", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches it through us, once
        )
    return Worker(process, said)


def _visible(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls the GPU that is number `index` to us."""
    given = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return given[index] if index < len(given) else str(index)


def _end(workers: Sequence[Worker]) -> None:
    """Ask those that still run to stop, and wait for it; who asks a second time is passed on too."""
    running = [w.process for w in workers if w.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    try:
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        raise
