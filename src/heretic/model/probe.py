"""Probe candidate writers: run single blocks on a few tokens with writers changed or zero-ablated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic.model.patching import forward_hooks
from heretic.model.writer import ResidualWriter, first_tensor, with_first

TOKENS = tuple(range(1, 17))  # enough for a router to choose several experts
# Largest share of its input that a block may add with all writers zero-ablated: rounding in half precision.
SILENT_SHARE = 1e-2

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class ProbeResult:
    """The result of `probe`."""

    writers: list[ResidualWriter]  # those that affect the stream
    silent: list[str] = field(default_factory=list)  # names of those that do not
    # Names of blocks whose stream other modules write to, or that do not return hidden states [rows, tokens, width].
    incomplete: list[str] = field(default_factory=list)


@torch.inference_mode()
def probe(model: PreTrainedModel, prefix: str, blocks: nn.ModuleList, writers: Sequence[ResidualWriter]) -> ProbeResult:
    """Rerun every block on its input of a short pass, with writers' outputs changed or zero-ablated.

    The cost is a few runs of every block on a few tokens, on any device map.
    """
    inputs = block_inputs(model, blocks)
    result = ProbeResult([])
    for layer, block in enumerate(blocks):
        if layer not in inputs:
            result.incomplete.append(f"{prefix}.{layer}")
            continue
        own_writers = [w for w in writers if w.layer == layer]
        runner = _Runner(block, inputs[layer])
        reaching = [
            w for w in own_writers if runner.affects_stream(w, [other for other in own_writers if other is not w])
        ]
        result.silent.extend(w.name for w in own_writers if w not in reaching)
        norms = runner.norms_behind(reaching)
        result.writers.extend(replace(w, norms=tuple(norms.get(w.name, ()))) for w in reaching)
        # A block that shares its writers with an earlier one has none of its own.
        modules = set(block.modules())
        shared = [w for w in writers if w.layer < layer and modules & set(w.modules)]
        if not runner.is_silent_without([*reaching, *shared]):
            result.incomplete.append(f"{prefix}.{layer}")
    return result


def block_inputs(model: PreTrainedModel, blocks: nn.ModuleList) -> dict[int, Arguments]:
    """Return the arguments of every block, by layer, in a pass over a few tokens."""
    calls: dict[int, Arguments] = {}

    def record(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            copied = [
                a.clone() if isinstance(a, Tensor) else a for a in args
            ]  # some blocks change their input in place
            calls[layer] = (tuple(copied), kwargs)

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(record(layer), with_kwargs=True).remove)
        tokens = torch.tensor([TOKENS], device=input_device(model))
        model(input_ids=tokens, use_cache=False)
    return calls


def run_block(block: nn.Module, inputs: Arguments, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Tensor:
    """Run a block on copies of its recorded inputs, with forward hooks; returns the stream after it."""
    args, kwargs = inputs
    with forward_hooks(hooks):
        return first_tensor(block(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs))


def stream_of(inputs: Arguments) -> Tensor | None:
    """Return the residual stream [rows, tokens, width] that a block with these arguments reads."""
    args, kwargs = inputs
    stream = args[0] if args else kwargs.get("hidden_states")
    return stream if isinstance(stream, Tensor) else None


def output_of(model: PreTrainedModel, blocks: nn.ModuleList, layer: int, inputs: Arguments, module: nn.Module) -> Any:
    """Return the output of a module inside a block in that pass; None if it is not called."""
    outputs: list[Any] = []
    with forward_hooks([(module, lambda _m, _i, output: outputs.append(output))]):
        blocks[layer](*inputs[0], **inputs[1])
    return outputs[0] if outputs else None


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of the input embeddings."""
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.device.type == "meta":  # offloaded; accelerate knows the execution device
        return torch.device(embeddings._hf_hook.execution_device)
    device: torch.device = embeddings.weight.device
    return device


@dataclass(frozen=True)
class _Runner:
    """One block with its recorded input."""

    block: nn.Module
    inputs: Arguments

    def __call__(self, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]] = ()) -> Tensor:
        return run_block(self.block, self.inputs, hooks)

    def affects_stream(self, writer: ResidualWriter, others: Sequence[ResidualWriter]) -> bool:
        """Return whether changing the writer's output changes the block's, with all others zero-ablated: modules that only gate
        or feed another writer do not count."""

        def move(_module: nn.Module, _inputs: object, output: Any) -> Any:
            first = first_tensor(output)
            return with_first(output, first + first.abs().mean() + 0.1)

        silent = [(other.module, zero_ablate) for other in others]
        moved = self([*silent, (writer.module, move)]) - self(silent)
        return bool(moved.abs().max() > 0)

    def norms_behind(self, writers: Sequence[ResidualWriter]) -> dict[str, list[nn.Module]]:
        """Return, by writer, the norms between its output and the stream: those with zero input when all writers of the
        component are zero-ablated, and nonzero input when only this one is not."""
        norms = [m for m in self.block.modules() if "RMSNorm" in type(m).__name__]
        norms_by_writer: dict[str, list[nn.Module]] = {}
        unchanged = self._norm_inputs(norms, [])
        for component in {w.component for w in writers}:
            group = [w for w in writers if w.component == component]
            without = self._norm_inputs(norms, group)
            candidates = [n for n in norms if _is_zero(without.get(n)) and not _is_zero(unchanged.get(n))]
            for writer in group:
                others = [w for w in group if w is not writer]
                alone = self._norm_inputs(norms, others) if others and candidates else unchanged
                norms_by_writer[writer.name] = [n for n in candidates if not _is_zero(alone.get(n))]
        return norms_by_writer

    def _norm_inputs(self, norms: Sequence[nn.Module], silent: Sequence[ResidualWriter]) -> Mapping[nn.Module, Tensor]:
        """The input of each norm with some writers zero-ablated."""
        inputs_by_norm: dict[nn.Module, Tensor] = {}

        def record(module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                inputs_by_norm[module] = inputs[0].clone()

        self([*((w.module, zero_ablate) for w in silent), *((n, record) for n in norms)])
        return inputs_by_norm

    def is_silent_without(self, writers: Sequence[ResidualWriter]) -> bool:
        """Return whether the block returns its input, up to a factor, with its writers zero-ablated."""
        before = stream_of(self.inputs)
        after = self([(module, zero_ablate) for w in writers for module in w.modules])
        if before is None or before.shape != after.shape or before.ndim != 3:
            return False
        before, after = before.to(after.device).float(), after.float()  # accelerate may move the input
        factor = (before * after).sum() / (before * before).sum()
        return bool((after - factor * before).norm() <= SILENT_SHARE * before.norm())


def zero_ablate(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """Forward hook that sets a module's output to zero."""
    return with_first(output, torch.zeros_like(first_tensor(output)))


def _is_zero(tensor: Tensor | None) -> bool:
    return tensor is not None and not bool(tensor.abs().max() > 0)
