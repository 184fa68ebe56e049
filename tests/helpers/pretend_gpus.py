"""Pretend CUDA GPUs on a machine that has none: values from the CPU, with CUDA's rules about devices, memory and waiting.

    with PretendGpus(4, memory=24 << 30) as gpus: ...     # torch sees cuda:0..3
    print(gpus.report())

A tensor on `cuda:k` is a wrapper (`GpuTensor`) around a CPU tensor. A TorchDispatchMode sees every operator that reaches PyTorch's
dispatcher, below autograd, and does four things before the CPU computes it:

* devices: operands on different devices raise CUDA's RuntimeError, except what CUDA allows: 0-dim CPU scalars where TensorIterator
  takes them, CPU indices for indexing, copies;
* memory: a storage counts on its GPU from its first tensor's birth to its last one's death. Beyond `limit` it raises
  torch.OutOfMemoryError. Peaks are kept, also by phase;
* synchronization: what makes the host wait for the GPU is counted with its line: item, bool, tolist, nonzero, boolean masks, and
  every copy between RAM and GPU that is not non_blocking (cudaMemcpyAsync + cudaStreamSynchronize in CUDA);
* launches: an operator that is no view counts as one kernel.

Limitations. It cannot show time; kernel workspaces, the CUDA context, fragmentation and the allocator's rounding; the numbers of
CUDA's own kernels, or that one is missing or wants another dtype or alignment; races (non_blocking copies are only listed in
`async_copies`); graphs, streams, NCCL, custom kernels (bitsandbytes, flash-attn, Triton); what a CPU kernel does within one
operator; accelerate's offloading to RAM. It needs g++ (once, 5 s).
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.pretend_cuda import cuda_pretended
from tests.helpers.pretend_graphs import NOT_PERMITTED, PretendGraph
from tests.helpers.pretend_operators import (
    COPIES,
    INDEXING,
    ON_CPU,
    STRICT,
    SYNCHRONIZING,
    WITHOUT_KERNEL,
    map_tensors,
    tensors_in,
    traits,
)

aten = torch.ops.aten
PROGRAM = "heretic/"  # part of the paths of the program under test


class Allocation:
    """One storage on a GPU, counted while any tensor refers to it."""

    def __init__(self, gpus: PretendGpus, gpu: int, size: int) -> None:
        self.gpus, self.gpu, self.size = gpus, gpu, 0
        free = gpus.limit[gpu] - gpus.used[gpu]
        if size > free:
            gpus.ooms += 1
            text = f"CUDA out of memory: {size} bytes on GPU {gpu}, {free} free (pretended) {gpus.caller()}"
            raise torch.OutOfMemoryError(text)
        self.size = size
        gpus.used[gpu] += size
        gpus.peak[gpu] = max(gpus.peak[gpu], gpus.used[gpu])
        peak = gpus.phase_peak[gpus.phase_name]
        peak[gpu] = max(peak[gpu], gpus.used[gpu])

    def __del__(self) -> None:
        self.gpus.used[self.gpu] -= self.size


class GpuTensor(Tensor):
    """A tensor on a pretend GPU: `inner` has the numbers, `allocation` the memory."""

    inner: Tensor
    allocation: Allocation

    @staticmethod
    def __new__(cls, inner, gpu=None, allocation=None, requires_grad=False):
        if gpu is None:  # accelerate makes a parameter by calling its class
            return torch.nn.Parameter(inner, requires_grad)
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", gpu),
        )

    def __init__(self, inner, gpu=None, allocation=None, requires_grad=False):
        if gpu is not None:
            self.inner, self.allocation = inner, allocation

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendGpus.entered().run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), copied)

    def __repr__(self, **_):
        return f"GpuTensor({self.inner!r}, device={self.device})"

    def tolist(self):
        PretendGpus.entered().record_sync("tolist", self.device.index)
        return PretendGpus.entered().read(self.inner).tolist()

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def _set_data(self, value):
        Tensor.data.__set__(self, value)
        self.inner, self.allocation = value.inner, value.allocation

    __array__, data = numpy, property(Tensor.detach, _set_data)


class Mode(TorchDispatchMode):
    """Hands every operator to the GPUs. Each thread needs one, and so do operators that are decomposed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return PretendGpus.entered().run(func, args, kwargs or {})


class PretendGpus:
    """The pretend machine; enter it before models are loaded. One at a time."""

    _entered: ClassVar[PretendGpus | None] = None
    backing: ClassVar[str] = "cpu"  # the device that computes; benchmarks/launch_log.py has no values and takes "meta"

    def __init__(
        self,
        count: int = 1,
        memory: int | Sequence[int] = 24 << 30,
        name: str = "NVIDIA GeForce RTX 4090",
        capability: tuple[int, int] = (8, 9),
    ) -> None:
        self.count, self.name, self.capability = count, name, capability
        self.memory = [memory] * count if isinstance(memory, int) else list(memory)
        self.limit = list(self.memory)  # what allocations are held to; `memory` is what code is told
        self.used, self.peak, self.current, self.ooms = [0] * count, [0] * count, 0, 0
        self.phase_name = "-"
        self.graph: PretendGraph | None = None  # that records launches now
        self.phase_peak: dict[str, list[int]] = defaultdict(lambda: [0] * count)
        self.launches: Counter[str] = Counter()  # by phase
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)  # by phase and operator
        self.syncs: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)  # by phase: (what, where)
        self.async_copies: Counter[tuple[str, str, str]] = Counter()  # (direction, pinned or pageable, where)
        self.peer_bytes: Counter[tuple[str, int, int, str]] = Counter()  # between GPUs: (phase, from, to, where)
        self.pinned: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.allocations: weakref.WeakValueDictionary[tuple[int, int], Allocation] = weakref.WeakValueDictionary()

    def __enter__(self) -> PretendGpus:
        assert PretendGpus._entered is None, "pretend GPUs do not nest"
        PretendGpus._entered = self
        self._stack = ExitStack()
        self._stack.callback(setattr, PretendGpus, "_entered", None)
        try:
            self._stack.enter_context(cuda_pretended(self, Mode, pretend_attention))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @classmethod
    def entered(cls) -> PretendGpus:
        """The machine that is entered now."""
        assert cls._entered is not None, "a tensor of a pretend GPU was used after it was left"
        return cls._entered

    def index_of(self, device: Any = None) -> int:
        """The number of a GPU, however it is spelled; the current one for None and `cuda`."""
        index = device if device is None or isinstance(device, int) else torch.device(device).index
        return self.current if index is None else index

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Launches, synchronizations and peaks within the context count under this name."""
        before, self.phase_name = self.phase_name, name
        try:
            yield
        finally:
            self.phase_name = before

    def caller(self) -> str:
        """The innermost line of the program, and of the library that it called."""
        frame, library = sys._getframe(1), None
        while frame is not None:
            path = frame.f_code.co_filename
            if PROGRAM in path and "/tests/" not in path:
                line = f"{path.split(PROGRAM)[-1]}:{frame.f_lineno}"
                return f"{line} < {library}" if library else line
            if library is None and "site-packages/torch/" not in path and "site-packages" in path:
                library = f"{path.split('site-packages/')[-1]}:{frame.f_lineno}"
            frame = frame.f_back
        return library or "?"

    def read(self, inner: Tensor) -> Tensor:
        """The values that a copy to RAM gives."""
        return inner

    def record_sync(self, what: str, gpu: int | str, mark: object = None) -> None:
        """The host waits for a GPU: for all that was launched on it, or up to the mark of an event."""
        if self.graph is not None:
            raise RuntimeError(f"{NOT_PERMITTED}: {what} {self.caller()}")
        self.syncs[self.phase_name][what, self.caller()] += 1

    def record_event(self, gpu: int) -> object:
        """An event is recorded on a GPU; returns what the waits for it are told."""
        return None

    def record_event_wait(self, gpu: int, mark: object) -> None:
        """A GPU waits for an event with this mark, the host does not."""

    def reset(self) -> None:
        """Counters to zero; what is alive stays counted."""
        for counter in (self.launches, self.kinds, self.syncs, self.async_copies, self.peer_bytes, self.phase_peak):
            counter.clear()
        self.peak = list(self.used)

    def report(self, most: int = 12) -> str:
        """Bytes by GPU, then launches and synchronizations by phase."""
        lines = [f"cuda:{i}: {self.used[i]} bytes now, peak {self.peak[i]}" for i in range(self.count)]
        for phase in sorted({*self.launches, *self.syncs}):
            syncs = self.syncs[phase]
            lines.append(f"[{phase}] {self.launches[phase]} launches, {sum(syncs.values())} synchronizations")
            lines += [f"    {n:6} {what:14} {where}" for (what, where), n in syncs.most_common(most)]
        return "\n".join(lines)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operator: check its operands, count it, compute it on the CPU, and put the results on their GPU."""
        name, composite, launched, viewing = traits(func)
        if composite:
            with Mode():  # reached whole in inference mode; decomposed as it is otherwise
                return func.decompose(*args, **kwargs)
        if kwargs.get("pin_memory"):
            made = func(*args, **{**kwargs, "pin_memory": False})
            self.pinned[made.untyped_storage()._cdata] = made.untyped_storage()
            return made
        tensors = tensors_in((*args, *kwargs.values()))
        on_gpus = [t for t in tensors if isinstance(t, GpuTensor)]
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not on_gpus and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if name not in COPIES:
            self._check_devices(func, name, args, tensors, on_gpus)
        target: int | str
        if device is not None:
            target = self.index_of(device) if device.type == "cuda" else device.type
        elif name == "copy_":
            target = args[0].device.index if isinstance(args[0], GpuTensor) else "cpu"
        else:
            target = on_gpus[0].device.index
        kind = self._count(name, args, kwargs, target) if launched or name in SYNCHRONIZING else ""
        if kind:
            self.launches[self.phase_name] += 1
            self.kinds[self.phase_name][kind] += 1
        return self._compute(func, name, args, kwargs, target, device, viewing)

    def _check_devices(self, func: Any, name: str, args: Any, tensors: list[Tensor], on_gpus: list[GpuTensor]) -> None:
        """Raise what CUDA does where operands are on different devices."""
        if name in INDEXING:
            values = [t for t in (args[0], *args[2:3]) if isinstance(t, Tensor) and (t is args[0] or t.dim())]
            counted = [*values, *(i for i in args[1] if isinstance(i, GpuTensor))]  # indices in RAM are allowed
        else:
            others = [t for t in tensors if t.device.type == "cpu" and (t.dim() or name in STRICT)]
            counted = [*on_gpus, *others]
        devices = sorted({str(t.device) for t in counted})
        if len(devices) > 1:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(devices[:2])}! (arguments of {func}; pretended) {self.caller()}"
            )

    def _count(self, name: str, args: Any, kwargs: dict[str, Any], target: int | str) -> str:
        """Count synchronizations; returns what the launched kernel is called, empty for none."""
        if name in ("_to_copy", "copy_"):
            return self._count_copy(name, args, kwargs, target)
        if name in SYNCHRONIZING:
            self.record_sync(name, target)
        elif name in INDEXING:
            for index in (i for i in args[1] if isinstance(i, Tensor)):
                if not isinstance(index, GpuTensor):
                    self.record_sync("index from RAM", target)
                elif index.dtype in (torch.bool, torch.uint8):
                    self.record_sync("boolean index", target)
        return "" if name in WITHOUT_KERNEL else name

    def _count_copy(self, name: str, args: Any, kwargs: dict[str, Any], target: int | str) -> str:
        source = args[name == "copy_"]
        origin = source.device.index if isinstance(source, GpuTensor) else "cpu"
        if not source.numel():
            return ""
        if origin == target:
            return name
        if self.graph is not None:  # a replay would read RAM that has another use by then
            raise RuntimeError(f"{NOT_PERMITTED}: copy {origin}>{target} {self.caller()}")
        if "cpu" not in (origin, target):
            size = source.numel() * source.element_size()
            self.peer_bytes[self.phase_name, origin, target, self.caller()] += size
        elif kwargs.get("non_blocking") or (len(args) > 2 and args[2]):
            in_ram = (
                source if origin == "cpu" else args[0]
            )  # for `_to_copy` to RAM the GPU's: new memory is never pinned
            pinned = not isinstance(in_ram, GpuTensor) and in_ram.untyped_storage()._cdata in self.pinned
            self.async_copies[f"{origin}>{target}", "pinned" if pinned else "pageable", self.caller()] += 1
        else:
            self.record_sync(f"copy {'to RAM' if target == 'cpu' else 'to GPU'}", origin if target == "cpu" else target)
        return f"copy {origin}>{target}"

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, target: Any, device: Any, viewing: bool) -> Any:
        inner = map_tensors(args, self._backed)
        named = {key: map_tensors(value, self._backed) for key, value in kwargs.items()}
        if device is not None:
            named["device"] = torch.device(self.backing)

        def compute() -> Any:
            made = ON_CPU.get(name, lambda *_: None)(func, inner, named)
            return func(*inner, **named) if made is None else made

        made = compute() if self.graph is None else self.graph.record(func, compute, inner, viewing)
        if target == "cpu" and name != "copy_":
            return map_tensors(made, self.read)
        if torch.Tag.inplace_view in func.tags and isinstance(
            args[0], GpuTensor
        ):  # squeeze_ and the like: another shape
            reshaped = GpuTensor(args[0].inner, args[0].device.index, args[0].allocation)
            Tensor.data.__set__(args[0], reshaped)
        given = {id(t.inner): t for t in tensors_in((*args, *kwargs.values())) if isinstance(t, GpuTensor)}

        def wrapped(tensor: Tensor) -> Tensor:  # what is changed in place stays the same tensor
            if id(tensor) in given:
                return given[id(tensor)]
            return self._on_gpu(tensor, target) if isinstance(target, int) else tensor

        if torch.is_inference_mode_enabled() and viewing and not args[0].is_inference():
            with torch.inference_mode(False):  # a view of an ordinary tensor is one
                return map_tensors(made, wrapped)
        return map_tensors(made, wrapped)

    def _backed(self, tensor: Tensor) -> Tensor:
        """The tensor that is computed with."""
        if isinstance(tensor, GpuTensor):
            return tensor.inner
        return tensor if tensor.is_meta else tensor.to(self.backing)

    def _on_gpu(self, inner: Tensor, gpu: int) -> GpuTensor:
        storage = inner.untyped_storage()
        allocation = self.allocations.get((storage._cdata, gpu))
        if allocation is None:
            allocation = self.allocations[storage._cdata, gpu] = Allocation(self, gpu, storage.nbytes())
        return GpuTensor(inner, gpu, allocation)


def pretend_attention(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch's attention, choosing on a GPU what CUDA would: the memory-efficient kernel, here by the CPU's fused one."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not isinstance(query, GpuTensor) or query.shape[-1] != value.shape[-1]:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:  # CUDA's kernels do this within themselves
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        attention = aten._scaled_dot_product_efficient_attention
        return attention(query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale)[0]

    return attend
