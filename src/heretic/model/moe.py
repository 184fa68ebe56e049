"""Mixtures of experts with all matrices in one tensor: the module that writes to the stream, and its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic.model.probe import TOKENS, Arguments, block_inputs, output_of
from heretic.model.writer import Part, ResidualWriter, first_tensor

# The tensor of all experts' output matrices, and their biases.
DOWN, BIAS = "down_proj", "down_proj_bias"


@dataclass(frozen=True)
class ExpertGroup:
    """A module with the output matrices of all its experts in one tensor [experts, ...]."""

    name: str
    layer: int
    parts: tuple[Part, ...]


def experts_in(block: nn.Module, layer: int, prefix: str, width: int) -> tuple[list[ExpertGroup], list[str]]:
    """Find the experts of a block; returns them and the names of those with an unknown layout."""
    experts, unrecognized = [], []
    for path, module in block.named_modules():
        name = f"{prefix}.{path}"
        down = getattr(module, DOWN, None)
        if not isinstance(down, Tensor) or down.ndim != 3:
            if path.rpartition(".")[2] == "experts":
                unrecognized.append(name)
            continue
        transposed = _is_transposed(module, down.shape, width)
        if transposed is None:
            unrecognized.append(name)
            continue
        parts = [Part(f"{name}.{DOWN}", module, DOWN, transposed=transposed)]
        if isinstance(getattr(module, BIAS, None), Tensor):
            parts.append(Part(f"{name}.{BIAS}", module, BIAS, is_bias=True))
        experts.append(ExpertGroup(name, layer, tuple(parts)))
    return experts, unrecognized


def _is_transposed(module: nn.Module, shape: Sequence[int], width: int) -> bool | None:
    """Whether the matrices are stored [inputs, width], by transformers' mark or by the sizes; None if unknown."""
    marked = getattr(module, "is_transposed", None)
    if isinstance(marked, bool):
        return marked if shape[2 if marked else 1] == width else None
    if shape[1] == shape[2]:
        return None
    return {shape[1]: False, shape[2]: True}.get(width)


@torch.inference_mode()
def merge_experts(
    model: PreTrainedModel, blocks: nn.ModuleList, experts: Sequence[ExpertGroup], writers: Sequence[ResidualWriter]
) -> tuple[list[ResidualWriter], list[str]]:
    """Merge the experts of every layer into one writer; returns all writers by layer and the names of uneditable mixtures.

    The writer is the module that outputs one vector a token: mostly the experts' own module, else its parent (Llama 4), with the
    writers in it. Its output must be zero when its parameters are: otherwise (experts with a skip connection) an edit of the output
    is not an edit of the weights.
    """
    if not experts:
        return list(writers), []
    inputs = block_inputs(model, blocks)
    merged, unrecognized = list(writers), []
    with _eager_experts(model):
        outputs = [(group, _output_module(model, blocks, group, inputs.get(group.layer), writers)) for group in experts]
    # One bad layer rules out all layers of its type: the router may not have used the path in the others.
    uneditable_types = {type(group.parts[0].owner) for group, output in outputs if output is None}
    for group, output in outputs:
        if output is None or type(group.parts[0].owner) in uneditable_types:
            unrecognized.append(group.name)
            continue
        mixture, held = output
        merged = [w for w in merged if w not in held] + [mixture]
    order = {w.name: i for i, w in enumerate(writers)}
    return sorted(merged, key=lambda w: (w.layer, order.get(w.name, len(order)))), unrecognized


def _output_module(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    experts: ExpertGroup,
    inputs: Arguments | None,
    writers: Sequence[ResidualWriter],
) -> tuple[ResidualWriter, list[ResidualWriter]] | None:
    if inputs is None:
        return None
    names = dict(model.named_modules())
    name = experts.name
    width = _width(experts.parts[0])
    while names[name] is not blocks[experts.layer]:
        module = names[name]
        held = [w for w in writers if w.layer == experts.layer and w.name.startswith(f"{name}.")]
        parts = (*experts.parts, *(part for w in held for part in w.parts))
        output = output_of(model, blocks, experts.layer, inputs, module)
        tensor = _tensor_of(output)
        if tensor is not None and tensor.numel() == len(TOKENS) * width and tensor.shape[-1] == width:
            if not any(part.tensor.device.type == "meta" for part in parts):  # offloaded parameters cannot be zeroed
                with _zeroed(parts):
                    residue = _tensor_of(output_of(model, blocks, experts.layer, inputs, module))
                if residue is None or bool(residue.abs().max() > 0):
                    return None
            return replace(ResidualWriter(name, experts.layer, "mlp", module), mixture=parts), held
        name = name.rpartition(".")[0]
    return None


def _width(down: Part) -> int:
    return down.tensor.shape[2 if down.transposed else 1]


def _tensor_of(output: Any) -> Tensor | None:
    if output is None:
        return None
    first = first_tensor(output)
    return first if isinstance(first, Tensor) else None


@contextmanager
def _eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Use the eager experts implementation within the context: grouped kernels reject expanded zeros."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def _zeroed(parts: Sequence[Part]) -> Iterator[None]:
    """Set parameters to zero within the context, without allocating memory."""
    originals: list[tuple[Part, nn.Parameter | None]] = []
    try:
        for part in parts:
            parameter = part.owner._parameters[part.attribute]
            assert parameter is not None
            originals.append((part, parameter))
            zeros = torch.zeros(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            part.owner._parameters[part.attribute] = nn.Parameter(zeros, requires_grad=False)
        yield
    finally:
        for part, parameter in originals:
            part.owner._parameters[part.attribute] = parameter
