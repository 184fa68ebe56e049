"""Find the accelerators of the machine: all that PyTorch can use, and NVIDIA's with their processes through NVML.

NVML needs no CUDA context and no GPU memory. It numbers GPUs by bus position; CUDA by default puts the fastest first
(CUDA_DEVICE_ORDER). `usable_gpus` uses PyTorch's numbers, matched by UUID. Anything that cannot be seen (no driver, MIG slices, the
processes on other vendors' devices) is reported as text.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import psutil

from heretic.errors import first_line
from heretic.hardware import devices
from heretic.hardware.devices import Device
from heretic.hardware.obstacles import Obstacle

MOST_GPUS, MOST_MEMORY = 1024, 1 << 50  # beyond any machine: larger values mean a broken driver

NATIVE_BFLOAT16 = (8, 0)  # first compute capability with it (Ampere); PyTorch claims it for older ones too
EXCLUSIVE, PROHIBITED = (1, 3), 2  # compute modes of NVML
SHARING = "nvidia-cuda-mps"  # NVIDIA's server that lets several processes compute on an exclusive GPU


@dataclass(frozen=True)
class GpuProcess:
    """Another process on a GPU; `used` is its GPU memory in bytes, None if unknown."""

    pid: int
    name: str
    used: int | None
    computes: bool = True  # else it only draws


@dataclass(frozen=True)
class Gpu:
    """One accelerator; `index` is its number among the visible ones, `total` and `free` are bytes, 0 if unknown."""

    index: int
    uuid: str
    name: str
    total: int
    free: int
    processes: tuple[GpuProcess, ...] = ()
    kind: str = devices.CUDA  # key of `devices.KINDS`; NVML lists no other
    obstacle: Obstacle | None = None  # why it cannot be used
    integrated: bool = False  # whether its memory is the RAM
    exclusive: bool = False  # whether one process at a time may compute on it
    emulates_bfloat16: bool = False  # whether it has no bfloat16 of its own

    @property
    def device(self) -> Device:
        """The GPU as a device for weights."""
        name = devices.device_name(self.kind, self.index)
        return Device(name, self.total, self.free, integrated=self.integrated)


@dataclass(frozen=True)
class GpuReport:
    """The visible GPUs, and a text on what could not be seen (None: nothing)."""

    gpus: tuple[Gpu, ...]
    problem: str | None = None


def visible_gpus(environment: Mapping[str, str] = os.environ) -> GpuReport:
    """Return the GPUs in CUDA_VISIBLE_DEVICES according to NVML. Never raises; errors end in `problem`."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and wanted.strip() in ("", "-1"):
        return GpuReport((), f"no GPU is visible: CUDA_VISIBLE_DEVICES is {wanted.strip()!r}")
    try:
        with _nvml() as nvml:
            return _query_gpus(nvml, wanted, environment.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST"))
    except Exception as error:  # a broken driver must not stop a run on the CPU
        return GpuReport((), _reason(error))


def gpus_here() -> tuple[Gpu, ...]:
    """Return the visible GPUs of this machine that PyTorch can use, with PyTorch's numbers. Never raises."""
    return usable_gpus(visible_gpus())


def inspect_gpus(environment: Mapping[str, str] = os.environ) -> tuple[GpuReport, tuple[Gpu, ...]]:
    """Return all GPUs, with a text on what cannot be seen, and those that PyTorch can use. Never raises.

    The report has PyTorch's numbers, then the GPUs that only NVML lists.
    """
    report = visible_gpus(environment)
    found, kind = _found(report), devices.current()
    usable, uuids = _without_obstacle(found), {gpu.uuid for gpu in found}
    unlisted = tuple(gpu for gpu in report.gpus if gpu.uuid not in uuids)
    if unlisted and not found:
        why = devices.obstacle_of_all()
        unlisted = tuple(replace(gpu, obstacle=gpu.obstacle or why) for gpu in unlisted)
    report = replace(report, gpus=(*found, *unlisted))
    if usable and kind and not kind.in_nvml:
        where = "programs on the GPU and their memory" if kind.unified else "the processes on them"
        report = replace(report, problem=f"{kind.title}: heretic cannot see {where}")
    elif not usable and not report.gpus and (reason := devices.unavailable()):
        report = replace(report, problem=f"{report.problem}; {reason}" if report.problem else reason)
    return report, usable


def usable_gpus(report: GpuReport) -> tuple[Gpu, ...]:
    """Return the GPUs that PyTorch can use, with PyTorch's numbers; empty without any. Never raises."""
    return _without_obstacle(_found(report))


def _without_obstacle(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in gpus if gpu.obstacle is None)


def _found(report: GpuReport) -> tuple[Gpu, ...]:
    """Return the GPUs that PyTorch lists, with its numbers.

    For a GPU whose memory NVML did not tell, PyTorch opens a context on it, except if its memory is the RAM.
    """
    gpus: list[Gpu] = []
    seen = {_plain(gpu.uuid): gpu for gpu in report.gpus}
    with suppress(RuntimeError, AssertionError):  # a driver too old for this PyTorch
        for found in devices.accelerators():
            match = seen.get(_plain(found.uuid))
            if match is None:
                # In NVML's form, so that another process that NVML does show this GPU finds the same lock.
                uuid = f"GPU-{_plain(found.uuid)}" if found.uuid else f"{found.kind}-{found.index}"
                match = Gpu(found.index, uuid, found.title, 0, 0, kind=found.kind)
            if found.integrated or not match.total:
                free, total = found.memory()
                match = replace(match, total=total, free=free, integrated=found.integrated)
            emulates = found.capability is not None and found.capability < NATIVE_BFLOAT16
            obstacle = match.obstacle or found.obstacle
            gpus.append(replace(match, index=found.index, obstacle=obstacle, emulates_bfloat16=emulates))
    return tuple(gpus)


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None without a driver."""
    try:
        with _nvml() as nvml:
            return _text(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # as in visible_gpus
        return None


@contextmanager
def _nvml() -> Iterator[ModuleType]:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _query_gpus(nvml: ModuleType, wanted: str | None, order: str) -> GpuReport:
    count = nvml.nvmlDeviceGetCount()
    if not 0 <= count <= MOST_GPUS:
        return GpuReport((), f"the NVIDIA driver reports an implausible number of GPUs: {count}")
    uuids = [_uuid(nvml, place) for place in range(count)]
    chosen, notes = _choose(wanted, uuids)
    gpus: list[Gpu] = []
    for place in chosen:
        try:  # a GPU that fell off the bus must not hide the others
            handle = nvml.nvmlDeviceGetHandleByIndex(place)
            name = _text(nvml.nvmlDeviceGetName(handle))
            if _has_mig(nvml, handle):
                notes.append(f"{name} is divided into MIG slices, which heretic does not inspect")
                continue
            memory = _memory(nvml, handle)
            total, free = memory or (0, 0)
            if memory and (not 0 <= free <= total < MOST_MEMORY or not total):
                notes.append(f"the NVIDIA driver reports implausible memory of {name}: {free} of {total} bytes free")
                continue
            gpu = Gpu(len(gpus), uuids[place], name, total, free, _processes(nvml, handle))
            gpus.append(_with_compute_mode(nvml, handle, gpu))
        except Exception as error:  # NVMLError and its like
            notes.append(f"GPU {place} does not respond: {first_line(error)}")
    if not count:
        notes.append("the NVIDIA driver reports no GPU")
    numbered = wanted is None or any(token.strip().isdigit() for token in wanted.split(","))
    if numbered and order != "PCI_BUS_ID" and len({gpu.name for gpu in gpus}) > 1:
        notes.append(
            "the GPUs differ, and CUDA numbers the fastest first, but the driver numbers them by slot: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID for the same numbers"
        )
    return GpuReport(tuple(gpus), "; ".join(notes) or None)


def _uuid(nvml: ModuleType, place: int) -> str:
    """Return the UUID of a GPU; empty if it does not respond."""
    try:
        return _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(place)))
    except nvml.NVMLError:
        return ""


def _choose(wanted: str | None, uuids: list[str]) -> tuple[list[int], list[str]]:
    """Return NVML's numbers of the GPUs in CUDA_VISIBLE_DEVICES, and notes; as for CUDA, the first unknown entry ends the list."""
    if wanted is None:
        return list(range(len(uuids))), []
    chosen: list[int] = []
    for token in (part.strip() for part in wanted.split(",")):
        if token.upper().startswith("MIG"):
            return chosen, [f"CUDA_VISIBLE_DEVICES has the MIG slice {token}, which heretic does not inspect"]
        if token.isdigit():
            matches = [int(token)] if int(token) < len(uuids) else []
        else:
            matches = [i for i, uuid in enumerate(uuids) if token and uuid.lower().startswith(token.lower())]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    else:
        return chosen, []
    return chosen, [f"CUDA_VISIBLE_DEVICES={wanted} has an invalid entry: {token!r}"]


def _has_mig(nvml: ModuleType, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except Exception:  # NVMLError for most GPUs, or another error of nvidia-ml-py with an old driver
        return False


def _memory(nvml: ModuleType, handle: Any) -> tuple[int, int] | None:
    """Return total and free bytes; None if the GPU has no memory of its own (GB10: "Not Supported")."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if "not supported" not in str(error).lower():
            raise
        return None
    return int(memory.total), int(memory.free)


def _with_compute_mode(nvml: ModuleType, handle: Any, gpu: Gpu) -> Gpu:
    """Return the GPU with what its compute mode forbids."""
    try:
        mode = nvml.nvmlDeviceGetComputeMode(handle)
    except Exception:  # NVMLError, or another error of nvidia-ml-py with an old driver
        return gpu
    if mode == PROHIBITED:
        fix = f"sudo nvidia-smi -i {gpu.uuid} -c DEFAULT"
        return replace(gpu, obstacle=Obstacle("its compute mode is Prohibited", fix))
    shared = any(process.name.startswith(SHARING) for process in gpu.processes)
    return replace(gpu, exclusive=mode in EXCLUSIVE and not shared)


def _processes(nvml: ModuleType, handle: Any) -> tuple[GpuProcess, ...]:
    """Return all other processes on a GPU, the largest first."""
    processes: dict[int, GpuProcess] = {}
    for query in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        with suppress(Exception):  # NVMLError, or another error of nvidia-ml-py with an old driver
            for process in getattr(nvml, query)(handle):
                if process.pid != os.getpid():
                    name = _process_name(nvml, process.pid)
                    found = GpuProcess(process.pid, name, process.usedGpuMemory, computes="Compute" in query)
                    processes.setdefault(process.pid, found)
    return tuple(sorted(processes.values(), key=lambda process: -(process.used or 0)))


def _process_name(nvml: ModuleType, pid: int) -> str:
    """Return a process's name; in a container NVML reports the host's process numbers, unknown to psutil."""
    with suppress(psutil.Error):
        return psutil.Process(pid).name()
    with suppress(nvml.NVMLError):
        return os.path.basename(_text(nvml.nvmlSystemGetProcessName(pid)))
    return "unknown"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _plain(uuid: str) -> str:
    return uuid.removeprefix("GPU-").lower()


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"):
        return "no NVIDIA driver"
    if isinstance(error, ImportError):
        return "the package nvidia-ml-py is not installed"
    return f"the NVIDIA driver does not respond: {str(error) or kind}"


def gpus_for(device_map: str | dict[str, int | str], usable: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Return the GPUs that a run with this `device_map` can use and therefore locks; none for a run on the CPU."""
    named = devices.named(device_map, [gpu.device for gpu in usable]) if isinstance(device_map, str) else None
    return usable if named is None else tuple(gpu for gpu in usable if gpu.device in named)
