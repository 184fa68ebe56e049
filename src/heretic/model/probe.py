"""What a model's own passes tell of the modules that were taken for writers: some tokens through one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic.model.writer import ResidualWriter, first_tensor, with_first

TOKENS = tuple(range(1, 17))  # enough for a router to choose several experts
# What a block adds to its input, as a share of that input, when all its writers are silent: rounding in half precision.
NOTHING = 1e-2

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class ProbeResult:
    """The writers that reach the stream, the names of those that do not, and the blocks to whose stream something else is added
    or whose stream is something else than hidden states."""

    writers: list[ResidualWriter]
    silent: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)


@torch.inference_mode()
def probe(model: PreTrainedModel, prefix: str, blocks: nn.ModuleList, writers: Sequence[ResidualWriter]) -> ProbeResult:
    """Run every block again on the input that it had in a short pass, with its writers' outputs moved or silenced.

    This costs a few blocks' worth of a few tokens each for every block, on any device map.
    """
    inputs = block_inputs(model, blocks)
    found = ProbeResult([])
    for layer, block in enumerate(blocks):
        if layer not in inputs:
            found.incomplete.append(f"{prefix}.{layer}")
            continue
        mine = [w for w in writers if w.layer == layer]
        run = _Runner(block, inputs[layer])
        reaching = [w for w in mine if run.affects_stream(w, [other for other in mine if other is not w])]
        found.silent.extend(w.name for w in mine if w not in reaching)
        norms = run.norms_behind(reaching)
        found.writers.extend(replace(w, norms=tuple(norms.get(w.name, ()))) for w in reaching)
        # A block that shares its writers with an earlier one has none of its own.
        own = set(block.modules())
        shared = [w for w in writers if w.layer < layer and own & set(w.modules)]
        if not run.is_silent_without([*reaching, *shared]):
            found.incomplete.append(f"{prefix}.{layer}")
    return found


def block_inputs(model: PreTrainedModel, blocks: nn.ModuleList) -> dict[int, Arguments]:
    """What every block is called with when a few tokens pass through the model, by its number."""
    calls: dict[int, Arguments] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            copied = [a.clone() if isinstance(a, Tensor) else a for a in args]  # some blocks write into their input
            calls[layer] = (tuple(copied), kwargs)

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        tokens = torch.tensor([TOKENS], device=input_device(model))
        model(input_ids=tokens, use_cache=False)
    return calls


def output_of(model: PreTrainedModel, blocks: nn.ModuleList, layer: int, inputs: Arguments, module: nn.Module) -> Any:
    """What a module inside a block gives out in that short pass; None if it is not called."""
    seen: list[Any] = []
    with _hooked([(module, lambda _m, _i, output: seen.append(output))]):
        blocks[layer](*inputs[0], **inputs[1])
    return seen[0] if seen else None


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of the input embeddings, where token ids go in."""
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.device.type == "meta":  # offloaded; accelerate knows where it will be when it is used
        return torch.device(embeddings._hf_hook.execution_device)
    device: torch.device = embeddings.weight.device
    return device


@dataclass(frozen=True)
class _Runner:
    """One block with the input that it had."""

    block: nn.Module
    inputs: Arguments

    def __call__(self, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]] = ()) -> Tensor:
        args, kwargs = self.inputs
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        with _hooked(hooks):
            return first_tensor(self.block(*args, **kwargs))

    def affects_stream(self, writer: ResidualWriter, others: Sequence[ResidualWriter]) -> bool:
        """Whether the block hands on something else when the writer's output is moved, by itself: all others are silent, so
        that what only gates or feeds them does not count."""

        def move(_module: nn.Module, _inputs: object, output: Any) -> Any:
            first = first_tensor(output)
            return with_first(output, first + first.abs().mean() + 0.1)

        silent = [(other.module, zero_ablate) for other in others]
        moved = self([*silent, (writer.module, move)]) - self(silent)
        return bool(moved.abs().max() > 0)

    def norms_behind(self, writers: Sequence[ResidualWriter]) -> dict[str, list[nn.Module]]:
        """By writer, the norms between its output and the stream: those that are given nothing when all writers of the
        component are silent, and something when this one alone speaks."""
        norms = [m for m in self.block.modules() if "RMSNorm" in type(m).__name__]
        found: dict[str, list[nn.Module]] = {}
        plain = self._given(norms, [])
        for component in {w.component for w in writers}:
            together = [w for w in writers if w.component == component]
            without = self._given(norms, together)
            behind = [n for n in norms if _is_zero(without.get(n)) and not _is_zero(plain.get(n))]
            for writer in together:
                others = [w for w in together if w is not writer]
                alone = self._given(norms, others) if others and behind else plain
                found[writer.name] = [n for n in behind if not _is_zero(alone.get(n))]
        return found

    def _given(self, norms: Sequence[nn.Module], silent: Sequence[ResidualWriter]) -> Mapping[nn.Module, Tensor]:
        """What each norm is given while some writers are silent."""
        given: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                given[module] = inputs[0].clone()

        self([*((w.module, zero_ablate) for w in silent), *((n, note) for n in norms)])
        return given

    def is_silent_without(self, writers: Sequence[ResidualWriter]) -> bool:
        """Whether the block hands on what it was given, up to a factor, when its writers are silent."""
        args, kwargs = self.inputs
        given = args[0] if args else kwargs.get("hidden_states")
        after = self([(module, zero_ablate) for w in writers for module in w.modules])
        if not isinstance(given, Tensor) or given.shape != after.shape or given.ndim != 3:
            return False
        given, after = given.to(after.device).float(), after.float()  # accelerate brings a block its input from another
        factor = (given * after).sum() / (given * given).sum()
        return bool((after - factor * given).norm() <= NOTHING * given.norm())


def zero_ablate(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """A hook after which a module writes nothing."""
    return with_first(output, torch.zeros_like(first_tensor(output)))


def _is_zero(tensor: Tensor | None) -> bool:
    return tensor is not None and not bool(tensor.abs().max() > 0)


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield
