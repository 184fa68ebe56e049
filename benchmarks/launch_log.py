"""The launch log of a program on pretend GPUs: every kernel with its FLOPs and bytes, every copy, every wait of the host.

The pretend GPUs of tests/helpers without values: tensors are on PyTorch's `meta` device, so that a 70B model needs no memory.
What the program reads from a GPU is zeros.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers.pretend_gpus import GpuTensor, PretendGpus

# Operators that read only the rows of their first operand that they return.
GATHERING = {"embedding", "index", "index_select", "gather", "_unsafe_index"}


class Launch(NamedTuple):
    """A kernel."""

    card: int
    flops: float
    bytes: float  # read and written
    matmul: bool  # whether it multiplies matrices, on tensor cores


class Copy(NamedTuple):
    """A copy between two cards, or between a card and RAM (-1)."""

    source: int
    target: int
    bytes: float


class Mark(NamedTuple):
    """An event is recorded: the moment when a card has done all that was launched on it before."""

    card: int
    number: int


class Delay(NamedTuple):
    """A card waits for a mark (of any card) before it goes on; the host does not."""

    card: int
    mark: int


class Wait(NamedTuple):
    """The host waits for a mark, or until a card has done all that was launched on it."""

    card: int
    mark: int | None = None


Event = Launch | Copy | Mark | Delay | Wait
RAM = NO_BLOCK = -1


@dataclass(frozen=True)
class Section:
    """Consecutive events of one phase."""

    name: str
    events: Sequence[Event]

    @classmethod
    def repeated(cls, name: str, events: Sequence[tuple[int, Event]], times: Mapping[int, int]) -> Section:
        """Build a section from (block, event), each run of a block's events so many times as `times` says (else once)."""
        runs = itertools.groupby(events, key=lambda pair: pair[0])
        return cls(name, [event for block, run in runs for event in [e for _, e in run] * times.get(block, 1)])

    @property
    def launches(self) -> int:
        """Number of kernels and copies."""
        return sum(isinstance(event, (Launch, Copy)) for event in self.events)

    @property
    def waits(self) -> int:
        """Number of waits of the host."""
        return sum(isinstance(event, Wait) for event in self.events)


class LaunchLog(PretendGpus):
    """Pretend GPUs that log what is launched; `phase(name)` names the events within it."""

    backing: ClassVar[str] = "meta"

    def __init__(self, count: int, memory: int) -> None:
        super().__init__(count, memory)
        self.events: list[tuple[str, int, Event]] = []  # phase, block, event
        self.block = NO_BLOCK  # the block that runs
        self.repeats: Mapping[int, int] = {}  # by block: how many such blocks the whole model has
        self.paused = False
        self._marks = itertools.count()
        self._launched = ""  # the operator that is being computed, if it launches a kernel

    def __enter__(self) -> LaunchLog:
        super().__enter__()
        return self

    def add(self, event: Event) -> None:
        """Log an event, unless the log is paused."""
        if not self.paused:
            self.events.append((self.phase_name, self.block, event))

    def record_sync(self, what: str, gpu: int | str, mark: object = None) -> None:
        """Log that the host waits for a GPU."""
        super().record_sync(what, gpu, mark)
        self.add(Wait(int(gpu), mark if isinstance(mark, int) else None))

    def record_event(self, gpu: int) -> object:
        """Log a mark."""
        mark = Mark(gpu, next(self._marks))
        self.add(mark)
        return mark.number

    def record_event_wait(self, gpu: int, mark: object) -> None:
        """Log that a GPU waits for a mark."""
        assert isinstance(mark, int)
        self.add(Delay(gpu, mark))

    def read(self, inner: Tensor) -> Tensor:
        """Return what was copied from RAM, else zeros."""
        known: Tensor | None = getattr(inner, "known", None)
        return torch.zeros(inner.shape, dtype=inner.dtype) if known is None else known.clone()

    def take(self) -> list[Section]:
        """Return the log so far by phase, with every block repeated, and start a new log."""
        events, self.events = self.events, []
        by_phase: dict[str, list[tuple[int, Event]]] = {}
        for name, block, event in events:
            by_phase.setdefault(name, []).append((block, event))
        return [Section.repeated(name, found, self.repeats) for name, found in by_phase.items()]

    def mark_blocks(self, blocks: Iterable[Any]) -> None:
        """Log which block runs."""
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._mark, number))
            block.register_forward_hook(partial(self._mark, NO_BLOCK))

    def _mark(self, block: int, *_: object) -> None:
        self.block = block

    def _count(self, name: str, args: Any, kwargs: dict[str, Any], target: int | str) -> str:
        self._launched = super()._count(name, args, kwargs, target)
        return self._launched

    def _count_copy(self, name: str, args: Any, kwargs: dict[str, Any], target: int | str) -> str:
        source = args[name == "copy_"]
        origin = source.device.index if isinstance(source, GpuTensor) else "cpu"
        if source.numel() and origin != target:
            start, end = (RAM if place == "cpu" else int(place) for place in (origin, target))
            self.add(Copy(start, end, source.numel() * source.element_size()))
        return super()._count_copy(name, args, kwargs, target)

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, target: Any, device: Any, viewing: bool) -> Any:
        launched, self._launched = self._launched, ""
        if name == "_local_scalar_dense":
            return self.read(args[0].inner).item()
        if name == "_to_copy" and target == "cpu":
            return self.read(args[0].inner)
        if name == "copy_" and target == "cpu":
            return args[0].copy_(self.read(args[1].inner))
        made = super()._compute(func, name, args, kwargs, target, device, viewing)
        if name == "_to_copy" and not isinstance(args[0], GpuTensor):
            made.inner.known = args[0]
        if launched and not launched.startswith("copy ") and isinstance(target, int):
            formula = flop_registry.get(func.overloadpacket)
            flops = float(formula(*args, **kwargs, out_val=made)) if formula else 0.0
            self.add(Launch(target, flops, bytes_of(name, args, kwargs, made), bool(flops)))
        return made


def bytes_of(name: str, args: Any, kwargs: Any, made: Any) -> float:
    """Bytes that a kernel reads and writes: its tensors once each, of gathered ones only what is gathered."""
    written = distinct(tree_leaves(made))
    operands = tree_leaves((args, kwargs))
    if name in GATHERING:
        return 2 * sum(map(size_of, written))
    return sum(map(size_of, distinct([*operands, *written])))


def distinct(leaves: Iterable[Any]) -> list[Tensor]:
    """The tensors on GPUs among these, without repetitions."""
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, GpuTensor)}.values())


def size_of(tensor: Tensor) -> float:
    """Bytes of the elements, those that expand repeats once."""
    own = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return float(torch.Size(own).numel() * tensor.element_size())


def on_cards(model: Any, card_of: Callable[[str], int]) -> None:
    """Put a meta model's parameters and buffers on the cards that `card_of` gives for their names."""
    for name, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is None:
                    continue
                card = card_of(f"{name}.{key}" if name else key)
                placed: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=f"cuda:{card}")
                kind[key] = torch.nn.Parameter(placed, requires_grad=False) if kind is module._parameters else placed
