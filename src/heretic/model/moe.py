"""Mixtures of experts whose matrices lie in one tensor: where they write, and the parameters that this is linear in."""

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
    """A module that holds the output matrices of all its experts in one tensor [experts, ...]."""

    name: str
    layer: int
    parts: tuple[Part, ...]


def experts_in(block: nn.Module, layer: int, prefix: str, width: int) -> tuple[list[ExpertGroup], list[str]]:
    """The experts of a block, and the names of those whose layout cannot be told."""
    found, unknown = [], []
    for path, module in block.named_modules():
        name = f"{prefix}.{path}"
        down = getattr(module, DOWN, None)
        if not isinstance(down, Tensor) or down.ndim != 3:
            if path.rpartition(".")[2] == "experts":
                unknown.append(name)
            continue
        transposed = _is_transposed(module, down.shape, width)
        if transposed is None:
            unknown.append(name)
            continue
        parts = [Part(f"{name}.{DOWN}", module, DOWN, transposed=transposed)]
        if isinstance(getattr(module, BIAS, None), Tensor):
            parts.append(Part(f"{name}.{BIAS}", module, BIAS, is_bias=True))
        found.append(ExpertGroup(name, layer, tuple(parts)))
    return found, unknown


def _is_transposed(module: nn.Module, shape: Sequence[int], width: int) -> bool | None:
    """Whether the matrices are stored [inputs, width]: as transformers marks it, else by the sizes; None: it cannot be told."""
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
    """All writers in order of layers, mixtures included, and the names of the mixtures that cannot be edited.

    A mixture writes where one vector a token comes out: mostly at the experts' own module, else at the module around it (Llama 4),
    which then also takes in the writers that it holds. With its parameters at zero nothing may come out; where something does
    (experts that hand on their input), an edit of what comes out would be more than one of the weights.
    """
    if not experts:
        return list(writers), []
    inputs = block_inputs(model, blocks)
    merged, unknown = list(writers), []
    with _one_by_one(model):
        places = [(found, _output_module(model, blocks, found, inputs.get(found.layer), writers)) for found in experts]
    # What is not all made by the weights in one layer is so in none: it is seen only where the router takes that way.
    unclear = {type(found.parts[0].owner) for found, place in places if place is None}
    for found, place in places:
        if place is None or type(found.parts[0].owner) in unclear:
            unknown.append(found.name)
            continue
        mixture, held = place
        merged = [w for w in merged if w not in held] + [mixture]
    order = {w.name: i for i, w in enumerate(writers)}
    return sorted(merged, key=lambda w: (w.layer, order.get(w.name, len(order)))), unknown


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
        tensor = _first(output)
        if tensor is not None and tensor.numel() == len(TOKENS) * width and tensor.shape[-1] == width:
            if not any(part.tensor.device.type == "meta" for part in parts):  # offloaded: nothing to be zeroed
                with _zeroed(parts):
                    nothing = _first(output_of(model, blocks, experts.layer, inputs, module))
                if nothing is None or bool(nothing.abs().max() > 0):
                    return None
            return replace(ResidualWriter(name, experts.layer, "mlp", module), mixture=parts), held
        name = name.rpartition(".")[0]
    return None


def _width(down: Part) -> int:
    return down.tensor.shape[2 if down.transposed else 1]


def _first(output: Any) -> Tensor | None:
    if output is None:
        return None
    first = first_tensor(output)
    return first if isinstance(first, Tensor) else None


@contextmanager
def _one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """Within the context experts are multiplied one after the other: the grouped kernels take no zeros without memory."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def _zeroed(parts: Sequence[Part]) -> Iterator[None]:
    """Within the context parameters are zero; no memory is taken for it."""
    own: list[tuple[Part, nn.Parameter | None]] = []
    try:
        for part in parts:
            parameter = part.owner._parameters[part.attribute]
            assert parameter is not None
            own.append((part, parameter))
            zeros = torch.zeros(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            part.owner._parameters[part.attribute] = nn.Parameter(zeros, requires_grad=False)
        yield
    finally:
        for part, parameter in own:
            part.owner._parameters[part.attribute] = parameter
