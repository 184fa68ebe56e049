"""What PyTorch, NVML and transformers answer about CUDA while `pretend_gpus.PretendGpus` is entered."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from tests.helpers.pretend_graphs import NoStream, PretendGraph

if TYPE_CHECKING:
    from tests.helpers.pretend_gpus import PretendGpus

SOURCE = Path(__file__).with_name("pretend_gpus.cpp")


def has_compiler() -> bool:
    """Whether g++ is here, which autograd on pretend GPUs needs."""
    return shutil.which("g++") is not None


def native_library() -> Path:
    """The compiled `pretend_gpus.cpp`, built once for each version of PyTorch and of the source."""
    folder = Path(tempfile.gettempdir()) / f"heretic-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    stamp = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    built = folder / f"pretend_gpus-{stamp}.so"
    if not built.exists():
        root = Path(torch.__file__).parent
        partial = built.with_suffix(f".{os.getpid()}")
        flags = [
            "-std=c++20",
            "-O0",
            "-shared",
            "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        ]
        places = [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(partial), *places], check=True, capture_output=True)
        partial.replace(built)  # another test process may build it at the same time
    return built


@contextmanager
def cuda_pretended(gpus: PretendGpus, mode: type[TorchDispatchMode], attention: Callable[..., Any]) -> Iterator[None]:
    """Within the context CUDA seems to be there, with these GPUs; on the way out everything is as it was."""
    functional, name = torch.nn.functional, "scaled_dot_product_attention"
    library = ctypes.CDLL(str(native_library()))
    with ExitStack() as stack:
        stack.callback(_forget_availability)
        library.pretend()
        stack.callback(library.restore)
        # torch.tensor makes its tensor on the CPU, then moves it.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        # Otherwise Module.to fills the shell of a CPU parameter.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the engine's threads have no mode
        kernels = torch.library.Library("aten", "IMPL")
        stack.callback(kernels._destroy)
        kernels.impl("silu_backward", _silu_backward, "AutogradCUDA")
        for patch in (
            mock.patch.multiple(torch.cuda, **_cuda(gpus)),
            mock.patch.multiple(torch.accelerator, **_accelerator(gpus)),
            mock.patch.object(torch, "Event", PretendEvent),
            mock.patch.object(torch, "Stream", NoStream),
            mock.patch.object(functional, name, attention(getattr(functional, name))),
            mock.patch.object(threading.Thread, "run", _run_within(mode)),
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda *_: 0, create=True),
        ):
            stack.enter_context(patch)
        stack.enter_context(_module("pynvml", _nvml(gpus)))
        _forget_availability()
        stack.enter_context(mode())
        yield


class PretendStream:
    """The only stream of a pretend GPU."""

    def __init__(self, gpus: PretendGpus, gpu: int) -> None:
        self.gpus, self.gpu = gpus, gpu

    def synchronize(self) -> None:
        self.gpus.record_sync("synchronize", self.gpu)

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: object) -> None:
        """There is one stream only."""

    def wait_event(self, event: PretendEvent) -> None:
        self.gpus.record_event_wait(self.gpu, event.mark)


class PretendEvent:
    """A moment in a pretend GPU's work; `mark` is the machine's own note of it."""

    def __init__(self, device: Any) -> None:
        self.stream: PretendStream | None = None
        self.mark: object = None

    def record(self, stream: PretendStream) -> None:
        self.stream, self.mark = stream, stream.gpus.record_event(stream.gpu)

    def synchronize(self) -> None:
        assert self.stream is not None, "an event that was never recorded"
        self.stream.gpus.record_sync("event", self.stream.gpu, self.mark)


def _silu_backward(gradient: Tensor, given: Tensor) -> Tensor:
    """Without a kernel for CUDA, as in PyTorch's CPU build, autograd would compose it of four operators."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.aten.silu_backward(gradient, given)


def _forget_availability() -> None:
    """transformers caches whether CUDA is there."""
    for value in vars(import_utils).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@contextmanager
def _module(name: str, module: types.ModuleType) -> Iterator[None]:
    """This module alone: `patch.dict(sys.modules)` would forget all that is imported meanwhile."""
    own = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        if own is None:
            del sys.modules[name]
        else:
            sys.modules[name] = own


def _run_within(mode: type[TorchDispatchMode]) -> Callable[[threading.Thread], None]:
    """transformers loads weights in a pool, and a thread has no mode of its own."""
    run = threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with mode():
            run(thread)

    return within


def _cuda(gpus: PretendGpus) -> dict[str, Any]:
    """By name, what replaces the functions of `torch.cuda`."""

    @contextmanager
    def device(which: Any) -> Iterator[None]:
        before, gpus.current = gpus.current, gpus.index_of(which)
        try:
            yield
        finally:
            gpus.current = before

    def properties(which: Any = None) -> types.SimpleNamespace:
        index, (major, minor) = gpus.index_of(which), gpus.capability
        return types.SimpleNamespace(
            name=gpus.name,
            total_memory=gpus.memory[index],
            major=major,
            minor=minor,
            uuid=f"{index}aaa-{index}",
            multi_processor_count=128,
            gcnArchName="",
        )

    def mem_get_info(which: Any = None) -> tuple[int, int]:
        index = gpus.index_of(which)
        return gpus.memory[index] - gpus.used[index], gpus.memory[index]

    def ignore(*_: object, **__: object) -> None:
        pass

    def synchronize(*_: object) -> None:
        gpus.record_sync("synchronize", gpus.current)

    def used(which: Any = None) -> int:
        return gpus.used[gpus.index_of(which)]

    nothing = ("_lazy_init", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "reset_peak_memory_stats")
    return {
        **dict.fromkeys((*nothing, "set_rng_state"), ignore),
        "_initialized": True,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device": device,
        "device_count": lambda: gpus.count,
        "current_device": lambda: gpus.current,
        "set_device": lambda which: setattr(gpus, "current", gpus.index_of(which)),
        "get_device_properties": properties,
        "get_device_name": lambda *_: gpus.name,
        "get_device_capability": lambda *_: gpus.capability,
        "mem_get_info": mem_get_info,
        "memory_allocated": used,
        "memory_reserved": used,
        "max_memory_allocated": lambda which=None: gpus.peak[gpus.index_of(which)],
        "synchronize": synchronize,
        "current_stream": lambda which=None: PretendStream(gpus, gpus.index_of(which)),
        "get_rng_state": lambda *_: torch.get_rng_state(),
    }


def _accelerator(gpus: PretendGpus) -> dict[str, Any]:
    """By name, what replaces the functions of `torch.accelerator`."""
    cuda = _cuda(gpus)
    renamed = {
        "get_memory_info": "mem_get_info",
        "set_device_index": "set_device",
        "max_memory_reserved": "max_memory_allocated",
    }
    same = ("is_available", "device_count", "memory_reserved", "synchronize", "empty_cache", "current_stream")
    return {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "empty_host_cache": cuda["empty_cache"],
        "Graph": lambda: PretendGraph(gpus),
        **{name: cuda[name] for name in same},
        **{name: cuda[own] for name, own in renamed.items()},
    }


def _nvml(gpus: PretendGpus) -> types.ModuleType:
    nvml, error = types.ModuleType("pynvml"), type("NVMLError", (Exception,), {})

    def mig_mode(_: int) -> None:
        raise error("Not Supported")

    vars(nvml).update(
        NVMLError=error,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"575.0",
        nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetCount=lambda: gpus.count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda index: f"GPU-{index}aaa-{index}",
        nvmlDeviceGetName=lambda _: gpus.name,
        nvmlDeviceGetMemoryInfo=lambda index: types.SimpleNamespace(
            total=gpus.memory[index], free=gpus.memory[index] - gpus.used[index]
        ),
        nvmlDeviceGetComputeRunningProcesses=lambda _: [],
        nvmlDeviceGetGraphicsRunningProcesses=lambda _: [],
    )
    return nvml
