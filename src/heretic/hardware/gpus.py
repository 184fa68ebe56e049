"""The NVIDIA GPUs that this process may use, and who else is on them, asked from the driver (NVML).

Asking NVML loads no CUDA context, so looking costs no GPU memory and works while another process fills the device. What it
cannot see is said in words instead of being guessed: no driver, MIG slices, GPUs of other makers.

NVML numbers GPUs by their place on the bus. CUDA does so only with CUDA_DEVICE_ORDER=PCI_BUS_ID; by default it puts the
fastest first. `usable_gpus` therefore numbers them as PyTorch does, matched by UUID.
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

MOST_GPUS, MOST_MEMORY = 1024, 1 << 50  # more than any machine has: a driver that says so is broken


@dataclass(frozen=True)
class GpuProcess:
    """Another process on a GPU; `used` is its GPU memory in bytes, None where the driver does not tell."""

    pid: int
    name: str
    used: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU; `index` is its place among the visible ones (`cuda:index`), `total` and `free` are bytes."""

    index: int
    uuid: str
    name: str
    total: int
    free: int
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True)
class GpuReport:
    """The visible GPUs, and what could not be seen, in words (None: everything was)."""

    gpus: tuple[Gpu, ...]
    problem: str | None = None


def visible_gpus(environment: Mapping[str, str] = os.environ) -> GpuReport:
    """Ask NVML for the GPUs that CUDA_VISIBLE_DEVICES leaves. Never raises: what fails ends in `unseen`."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and wanted.strip() in ("", "-1"):
        return GpuReport((), f"no GPU is visible: CUDA_VISIBLE_DEVICES is {wanted.strip()!r}")
    try:
        with _nvml() as nvml:
            return _query_gpus(nvml, wanted, environment.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST"))
    except Exception as error:  # a broken driver must not stop a run on the CPU
        return GpuReport((), _reason(error))


def gpus_here() -> tuple[Gpu, ...]:
    """The visible GPUs of this machine that PyTorch can use, numbered as it numbers them. Never raises."""
    return usable_gpus(visible_gpus())


def usable_gpus(report: GpuReport) -> tuple[Gpu, ...]:
    """The GPUs that PyTorch can use, numbered as it numbers them; empty without CUDA. Never raises.

    A device that NVML did not list is described by PyTorch itself, which opens a CUDA context on it and sees no processes.
    """
    import torch

    found: list[Gpu] = []
    with suppress(RuntimeError, AssertionError):  # a driver too old for this PyTorch
        if not torch.cuda.is_available():
            return ()
        seen = {_plain(gpu.uuid): gpu for gpu in report.gpus}
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            uuid = str(getattr(properties, "uuid", ""))
            match = seen.get(_plain(uuid))
            if match is None:
                free, total = torch.cuda.mem_get_info(index)
                match = Gpu(index, uuid or f"cuda-{index}", properties.name, total, free)
            found.append(replace(match, index=index))
    return tuple(found)


def driver_version() -> str | None:
    """Of the NVIDIA driver; None where there is none."""
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
        return GpuReport((), f"the NVIDIA driver reports {count} GPUs, which is not believed")
    uuids = [_uuid(nvml, place) for place in range(count)]
    chosen, notes = _choose(wanted, uuids)
    gpus: list[Gpu] = []
    for place in chosen:
        try:  # one that has fallen off the bus must not hide the others
            handle = nvml.nvmlDeviceGetHandleByIndex(place)
            name = _text(nvml.nvmlDeviceGetName(handle))
            if _has_mig(nvml, handle):
                notes.append(f"{name} is divided into MIG slices, which are not looked into")
                continue
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            total, free = int(memory.total), int(memory.free)
            if not 0 <= free <= total < MOST_MEMORY or not total:
                notes.append(f"{name} is said to have {free} of {total} bytes free, which is not believed")
                continue
            gpus.append(Gpu(len(gpus), uuids[place], name, total, free, _processes(nvml, handle)))
        except Exception as error:  # NVMLError and its like
            notes.append(f"GPU {place} cannot be asked: {first_line(error)}")
    if not count:
        notes.append("the NVIDIA driver reports no GPU")
    numbered = wanted is None or any(token.strip().isdigit() for token in wanted.split(","))
    if numbered and order != "PCI_BUS_ID" and len({gpu.name for gpu in gpus}) > 1:
        notes.append(
            "the GPUs differ, and CUDA numbers the fastest first while the driver numbers them by slot: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID to be sure which is cuda:0"
        )
    return GpuReport(tuple(gpus), "; ".join(notes) or None)


def _uuid(nvml: ModuleType, place: int) -> str:
    """Empty for a GPU that does not answer."""
    try:
        return _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(place)))
    except nvml.NVMLError:
        return ""


def _choose(wanted: str | None, uuids: list[str]) -> tuple[list[int], list[str]]:
    """Places of the GPUs that CUDA_VISIBLE_DEVICES names, read as CUDA does: the first entry it does not know ends the list."""
    if wanted is None:
        return list(range(len(uuids))), []
    chosen: list[int] = []
    for token in (part.strip() for part in wanted.split(",")):
        if token.upper().startswith("MIG"):
            return chosen, [f"CUDA_VISIBLE_DEVICES names the MIG slice {token}, which is not looked into"]
        if token.isdigit():
            matches = [int(token)] if int(token) < len(uuids) else []
        else:
            matches = [i for i, uuid in enumerate(uuids) if token and uuid.lower().startswith(token.lower())]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    else:
        return chosen, []
    return chosen, [f"CUDA_VISIBLE_DEVICES={wanted} stops being valid at {token!r}"]


def _has_mig(nvml: ModuleType, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except (
        Exception
    ):  # NVMLError: most GPUs have no such mode; nvidia-ml-py's own where an old driver lacks the function
        return False


def _processes(nvml: ModuleType, handle: Any) -> tuple[GpuProcess, ...]:
    """All processes but this one, the largest first."""
    found: dict[int, GpuProcess] = {}
    for ask in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        with suppress(Exception):  # NVMLError, and nvidia-ml-py's own where an old driver lacks the function
            for process in getattr(nvml, ask)(handle):
                if process.pid != os.getpid():
                    name = _process_name(nvml, process.pid)
                    found.setdefault(process.pid, GpuProcess(process.pid, name, process.usedGpuMemory))
    return tuple(sorted(found.values(), key=lambda process: -(process.used or 0)))


def _process_name(nvml: ModuleType, pid: int) -> str:
    """In a container NVML reports the host's process numbers, which psutil may not know."""
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
    return f"the NVIDIA driver could not be asked: {str(error) or kind}"


def gpus_for(device_map: str | dict[str, int | str], usable: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs that a run with this `device_map` may use and therefore locks; none for a run on the CPU."""
    if not isinstance(device_map, str):
        return usable
    if device_map.startswith("cuda:"):
        return tuple(gpu for gpu in usable if device_map == f"cuda:{gpu.index}")
    return () if device_map == "cpu" else usable
