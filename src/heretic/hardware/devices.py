"""Devices: the only module that names kinds of accelerators.

`KINDS` has what differs between them; the rest goes through `torch.accelerator`. heretic has run on none of them but the CPU
(docs/gpus.md). PyTorch is imported on use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heretic.errors import first_line
from heretic.hardware.obstacles import Obstacle, missing_kernels, start_failure
from heretic.hardware.ram import memory

if TYPE_CHECKING:
    import torch

CPU = "cpu"


@dataclass(frozen=True)
class Kind:
    """A kind of accelerators. The defaults claim nothing: what a kind can do more is set in `KINDS`."""

    prefix: str  # PyTorch's name of its devices, as in `device_map`
    title: str
    install: str  # how to get a PyTorch that uses it
    monitor: str = ""  # program that lists its processes
    visibility: tuple[str, ...] = ()  # environment variables that select devices, the usual one first
    several: bool = True  # whether a machine can have several devices
    pinned: bool = False  # whether pinned RAM makes copies to it asynchronous
    float64: bool = False  # whether all devices of the kind compute in float64
    unified: bool = False  # whether its memory is the RAM
    in_nvml: bool = False  # whether NVML lists its devices and their processes
    graphs: bool = False  # whether PyTorch captures its launches and replays them


PYTORCH = "https://pytorch.org/get-started"
CUDA, ROCM, MPS = "cuda", "rocm", "mps"
KINDS = {
    CUDA: Kind(
        CUDA,
        "NVIDIA (CUDA)",
        f"install PyTorch with CUDA for your driver: {PYTORCH}",
        "nvidia-smi",
        ("CUDA_VISIBLE_DEVICES",),
        pinned=True,
        float64=True,
        in_nvml=True,
        graphs=True,
    ),
    ROCM: Kind(  # PyTorch calls AMD's devices cuda too (its notes on HIP)
        CUDA,
        "AMD (ROCm)",
        f"install PyTorch for ROCm: {PYTORCH}",
        "amd-smi",
        ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        pinned=True,
        float64=True,
        graphs=True,
    ),
    "xpu": Kind(  # Arc of the A series has no float64 (intel/torch-xpu-ops, issue 1742)
        "xpu",
        "Intel (XPU)",
        f"install PyTorch for XPU: {PYTORCH}",
        "xpu-smi",
        ("ZE_AFFINITY_MASK",),
        pinned=True,
    ),
    MPS: Kind(
        MPS,
        "Apple (MPS)",
        "install macOS 14 or newer and an arm64 build of Python and PyTorch",
        several=False,
        unified=True,
    ),
    "npu": Kind(
        "npu",
        "Ascend (NPU)",
        "install CANN and the torch-npu of your PyTorch's version",
        "npu-smi",
        ("ASCEND_RT_VISIBLE_DEVICES",),
    ),
}
ACCELERATORS = frozenset(kind.prefix for kind in KINDS.values())

# For bug reports.
VARIABLES = (
    *dict.fromkeys(name for kind in KINDS.values() for name in kind.visibility),
    "CUDA_DEVICE_ORDER",
    "ROCR_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
    "PYTORCH_ENABLE_MPS_FALLBACK",
)
PACKAGES = ("nvidia-ml-py", "torch-npu")

# Errors of accelerators are plain RuntimeErrors (Triton's ValueErrors) and only their texts tell: aten/src/ATen/TensorIterator.cpp,
# c10/cuda/CUDAException.h, aten/src/ATen/mps/MPSAllocator.mm; for Intel pytorch/pytorch, issues 177714 and 190972.
OUT_OF_MEMORY = re.compile(
    r"out of memory|[Cc]an(?:'t|not) allocate memory|BLAS_STATUS_ALLOC_FAILED"
    r"|UR_RESULT_ERROR_OUT_OF_(DEVICE_MEMORY|HOST_MEMORY|RESOURCES)"
    r"|Invalid buffer size: [\d.]+ [KMGT]i?B|kIOGPUCommandBufferCallbackErrorOutOfMemory"
)
MISMATCH = re.compile(
    r"same device|expected device|different devices|\bis on (cpu|gpu|cuda|xpu|mps|npu)"
    r"|torch\.(cuda|xpu|mps|npu)\.\w*Tensor|\(MPS\w+Type\)|not been allocated on MPS device|cannot be accessed from Triton",
    re.IGNORECASE,
)
FAILURE = re.compile(
    r"\b(CUDA|HIP|XPU|MPS|NPU)( runtime| driver| function)? error|\b(CU|ROC|HIP)[A-Z]+_STATUS_|\bUR_RESULT_ERROR_"
    r"|\bcuDNN\b|\b(NCCL|HCCL)\b|device-side assert|no kernel image|illegal memory access",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Device:
    """A device for weights, with the name that PyTorch gives it; `total` and `free` memory in bytes."""

    name: str
    total: int
    free: int
    native_bfloat16: bool = False  # of a CPU: whether it multiplies matrices in bfloat16 with its own instructions
    integrated: bool = False  # of a GPU: whether its memory is the RAM, unlike that of others of its kind

    @property
    def is_gpu(self) -> bool:
        """Whether the device is an accelerator."""
        return self.name != CPU

    @property
    def key(self) -> int | str:
        """Accelerate's name for the device: the number of one that has a number, else the name."""
        _, _, number = self.name.partition(":")
        return int(number) if number else self.name

    @property
    def uses_ram(self) -> bool:
        """Whether the device's memory is the RAM."""
        return self.integrated or any(kind.unified for kind in KINDS.values() if kind.prefix == self.name)

    def is_called(self, value: int | str) -> bool:
        """Whether a setting means this device: by its name, its number, or as the first one of its kind."""
        name = str(value).strip().lower()
        prefix, _, number = self.name.partition(":")
        first = (prefix, f"{prefix}:0") if number in ("", "0") else ()
        return name == self.name or (self.is_gpu and (name == (number or "0") or name in first))


@dataclass(frozen=True)
class Accelerator:
    """A device that PyTorch finds; opening it for more than this takes memory on it."""

    kind: str  # key of KINDS
    index: int
    title: str
    uuid: str  # empty if PyTorch does not report it
    capability: tuple[int, int] | None = None  # of CUDA; None: unknown
    integrated: bool = False  # whether its memory is the RAM

    @property
    def obstacle(self) -> Obstacle | None:
        """Why PyTorch cannot compute on it: this build has no kernels for it. None if it has, or the build does not tell."""
        import torch

        if self.capability is None:
            return None
        built: list[str] = getattr(torch.get_device_module(CUDA), "get_arch_list", list)()
        return missing_kernels(self.capability, built, torch.__version__, KINDS[self.kind].install)

    def memory(self) -> tuple[int, int]:
        """Return free and total memory in bytes, as PyTorch reports them."""
        return _memory(KINDS[self.kind], self.index)


def device_name(kind: str, index: int) -> str:
    """Return PyTorch's name of a device of this kind."""
    prefix = KINDS[kind].prefix
    return f"{prefix}:{index}" if KINDS[kind].several else prefix


def current_kind() -> str | None:
    """Return the key of the kind that PyTorch can use here; None without one. Never raises."""
    return _known(available=True)


def current() -> Kind | None:
    """Return the kind that PyTorch can use here; None without one. Never raises."""
    kind = current_kind()
    return KINDS[kind] if kind else None


def unavailable() -> str | None:
    """Explain why an accelerator that PyTorch is built for is not used; None if NVML explains it or there is nothing to explain."""
    import torch

    if current_kind() is not None:
        return None
    built = _torch_type(available=False)
    kind = _known(available=False)
    if kind is not None:
        return (
            None
            if KINDS[kind].in_nvml
            else f"PyTorch is built for {KINDS[kind].title}, but finds no device{_failure_to_start()}"
        )
    return f"heretic does not know PyTorch's accelerator {built!r} (PyTorch {torch.__version__})" if built else None


def obstacle_of_all() -> Obstacle:
    """Return why PyTorch lists none of the GPUs that NVML lists; starts CUDA for its error."""
    import torch

    error = ""
    if torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as failure:  # RuntimeError, AssertionError or PyTorch's DeferredCudaCallError
            error = first_line(failure)
    return start_failure(error, torch.__version__, torch.version.cuda, KINDS[CUDA].install)


def accelerators() -> list[Accelerator]:
    """Return the devices that PyTorch can use here, in its order; empty without any. Never raises."""
    import torch

    kind = current_kind()
    if kind is None:
        return []
    with suppress(RuntimeError, AssertionError):  # a driver too old for this PyTorch
        return [_accelerator(kind, index) for index in range(torch.accelerator.device_count())]
    return []


def is_accelerator(device: torch.device) -> bool:
    """Return whether a tensor's device is an accelerator, not the CPU and not PyTorch's meta device."""
    return device.type in ACCELERATORS


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a tensor's accelerator."""
    kind = current()
    return _memory(kind, device.index or 0)[0] if kind else 0


def own_memory(index: int) -> tuple[int, int]:
    """Return bytes that this process holds on an accelerator, now and at most; 0 for what PyTorch does not count."""
    import torch

    kind = current()
    if kind is None:
        return 0, 0
    module: Any = torch.get_device_module(kind.prefix)
    with suppress(RuntimeError, AttributeError):
        return int(torch.accelerator.memory_reserved(index)), int(torch.accelerator.max_memory_reserved(index))
    return int(module.driver_allocated_memory()) if kind.unified else 0, 0


def title_of(device: torch.device) -> str:
    """Return the name of the hardware behind a tensor's accelerator."""
    return _title_and_uuid(device.type, device.index or 0)[0]


def for_float64(device: torch.device) -> torch.device | str:
    """Return the device itself if it computes in float64, else the CPU."""
    kind = current()
    return device if not is_accelerator(device) or (kind and kind.float64) else CPU


def pins_memory() -> bool:
    """Return whether pinned RAM makes copies to the accelerator asynchronous."""
    kind = current()
    return kind is not None and kind.pinned


def captures_graphs() -> bool:
    """Return whether the accelerator's launches can be captured and replayed, by this version of PyTorch."""
    import torch

    kind = current()
    return kind is not None and kind.graphs and hasattr(torch.accelerator, "Graph")


def empty_cache() -> None:
    """Release what PyTorch holds for later tensors: memory of the accelerator, and pinned RAM."""
    import torch

    if kind := current():
        torch.get_device_module(kind.prefix).empty_cache()
        if kind.pinned and hasattr(torch.accelerator, "empty_host_cache"):  # missing in older versions of PyTorch
            torch.accelerator.empty_host_cache()


def usual_name() -> str:
    """Return the name of the first accelerator here, or of a usual one, for messages."""
    return device_name(current_kind() or CUDA, 0)


def build_versions() -> dict[str, str]:
    """Return the versions of the interfaces that PyTorch is built for."""
    import torch

    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    return {f"{name} of PyTorch": str(version) for name, version in built.items() if version}


def named(device_map: str, devices: Sequence[Device]) -> list[Device] | None:
    """Return the device that a `device_map` names, [] if it is not among these, None if the text names a way to place."""
    found = [device for device in devices if device.is_called(device_map)]
    return found if found or ":" in device_map or device_map in (CPU, *ACCELERATORS) else None


def _torch_type(*, available: bool) -> str | None:
    import torch

    with suppress(RuntimeError, AssertionError):  # a driver too old for this PyTorch
        device = torch.accelerator.current_accelerator(check_available=available)
        return device.type if device is not None else None
    return None


def _known(*, available: bool) -> str | None:
    import torch

    found = _torch_type(available=available)
    if found == CUDA and torch.version.hip:
        return ROCM
    return found if found in KINDS else None


def _failure_to_start() -> str:
    import torch

    try:
        torch.accelerator.device_count()
    except (RuntimeError, AssertionError) as error:
        return f" ({first_line(error)})"
    return ""


def _title_and_uuid(prefix: str, index: int) -> tuple[str, str]:
    import torch

    if prefix == MPS:
        return torch.backends.mps.get_name(), ""
    properties: Any = torch.get_device_module(prefix).get_device_properties(index)
    return str(properties.name), str(getattr(properties, "uuid", ""))


def _accelerator(kind: str, index: int) -> Accelerator:
    import torch

    prefix = KINDS[kind].prefix
    query = getattr(torch.get_device_module(prefix), "get_device_capability", None) if kind == CUDA else None
    capability = query(index) if query else None
    return Accelerator(kind, index, *_title_and_uuid(prefix, index), capability, _integrated(KINDS[kind], index))


def _integrated(kind: Kind, index: int) -> bool:
    """Return whether an NVIDIA GPU has no memory but the RAM (GB10, Jetson)."""
    import torch

    if kind is not KINDS[CUDA]:
        return False
    return bool(getattr(torch.get_device_module(CUDA).get_device_properties(index), "is_integrated", False))


def _memory(kind: Kind, index: int) -> tuple[int, int]:
    """Return free and total bytes; all of it is free if neither PyTorch nor the driver tells (Intel in WSL 2)."""
    import torch

    module: Any = torch.get_device_module(kind.prefix)
    if _integrated(kind, index):  # the driver counts cached files as used
        total = int(module.get_device_properties(index).total_memory)
        return min(total, memory()[1]), total
    if kind.unified:  # Metal's advice for one process; what other programs hold is missing in the RAM
        total = int(module.recommended_max_memory())
        return max(0, min(total - int(module.driver_allocated_memory()), memory()[1])), total
    for query in _memory_queries(module):
        with suppress(RuntimeError):
            free, total = query(index)
            return int(free), int(total)
    total = int(module.get_device_properties(index).total_memory)
    return total, total


def _memory_queries(module: Any) -> Iterator[Any]:
    import torch

    # The common query is missing in older versions of PyTorch, the module's own in some kinds.
    for owner, name in ((getattr(torch, "accelerator", None), "get_memory_info"), (module, "mem_get_info")):
        if query := getattr(owner, name, None):
            yield query
