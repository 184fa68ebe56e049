"""Bake operators into weights: in memory for a trial, or tensor by tensor for an export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from heretic.ablation.operator import Operator
from heretic.errors import UserError
from heretic.model.checkpoint import Checkpoint
from heretic.model.tensor_names import loaded_names
from heretic.model.writer import Part, ResidualWriter


def bake_weight(operator: Operator, weight: Tensor, *, transposed: bool) -> Tensor:
    """Apply the operator to a weight (3D: each expert) in float32; the result has the weight's dtype and layout."""
    if weight.ndim == 3:
        baked = torch.empty_like(weight)
        for expert, matrix in enumerate(weight):
            baked[expert] = bake_weight(operator, matrix, transposed=transposed)
        return baked
    full = weight.T if transposed else weight
    baked = operator.on_weight(full)
    return (baked.T if transposed else baked).to(weight.dtype).contiguous()


def bake_bias(operator: Operator, bias: Tensor) -> Tensor:
    """Apply the operator to a bias [width] or [experts, width], which is also added to the stream."""
    return operator.on_bias(bias.float()).to(bias.dtype)


def bake_part(operator: Operator, part: Part, tensor: Tensor) -> Tensor:
    """Apply the operator to a parameter of a writer."""
    if part.is_bias:
        return bake_bias(operator, tensor)
    return bake_weight(operator, tensor, transposed=part.transposed)


OriginalWeights = Callable[[str], Tensor]


@contextmanager
@torch.no_grad()
def rewritten_weights(
    writers: Sequence[ResidualWriter], operators: Mapping[str, Operator], original: OriginalWeights
) -> Iterator[None]:
    """Edit the weights within the context, and restore them bit for bit at its end.

    `original` returns a parameter's tensor by name: from a copy (`copy_weights`) or the files (`read_from_checkpoint`).
    """
    touched: list[tuple[str, Tensor]] = []
    try:
        for writer in writers:
            operator = operators.get(writer.name)
            if operator is None:
                continue
            if writer.offloaded or any(part.quantized for part in writer.parts):
                raise UserError(
                    f"Cannot rewrite the weight of {writer.name}, which is offloaded or quantized.",
                    code="weight-not-editable",
                    fix='set apply = "operators"',
                )
            for part in writer.parts:
                tensor = part.tensor
                touched.append((part.name, tensor))
                tensor.copy_(bake_part(operator.to(tensor.device), part, tensor))
        yield
    finally:
        for name, parameter in touched:
            parameter.copy_(original(name))


def copy_weights(writers: Sequence[ResidualWriter]) -> OriginalWeights:
    """Copy the writers' tensors, each on its own device."""
    copies = {part.name: part.tensor.detach().clone() for writer in writers for part in writer.parts}
    return copies.__getitem__


def read_from_checkpoint(checkpoint: Checkpoint, writers: Sequence[ResidualWriter], model: Any) -> OriginalWeights:
    """Return a reader of the original tensors from the checkpoint. Raises UserError if it is quantized or names do not match."""
    if checkpoint.gguf_file or checkpoint.quantized_by:
        raise UserError(
            "The checkpoint is quantized, so heretic cannot restore the original weights exactly from it.",
            code="weights-not-restorable",
            where="cache_weights",
            fix='cache_weights = true, apply = "operators", or the model as safetensors',
        )
    parts = sources(checkpoint, writers, model)

    def read(name: str) -> Tensor:
        stored = parts[name]
        tensors = [checkpoint.read(source) for source in stored.names]
        whole = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
        return whole.mT.contiguous() if stored.transposed else whole

    return read


@dataclass(frozen=True)
class StoredPart:
    """The checkpoint tensors of a parameter: one, or one per expert in order; `transposed`: in the last two axes."""

    names: tuple[str, ...]
    transposed: bool = False


def sources(checkpoint: Checkpoint, writers: Sequence[ResidualWriter], model: Any) -> dict[str, StoredPart]:
    """Map each parameter of the writers to its checkpoint tensors, with the renaming rules of transformers.

    Raises:
        UserError: if a parameter has no tensor of its shape, or not one for every expert.
    """
    wanted = {part.name: part for writer in writers for part in writer.parts}
    by_parameter: dict[str, list[str]] = {}
    for name, parameter in loaded_names(model, checkpoint.tensors).items():
        if parameter in wanted:
            by_parameter.setdefault(parameter, []).append(name)
    parts = {name: _stored_part(checkpoint, part, by_parameter.get(name, [])) for name, part in wanted.items()}
    if len({source for stored in parts.values() for source in stored.names}) != sum(
        len(s.names) for s in parts.values()
    ):
        raise UserError(
            "Two edited modules share one tensor of the checkpoint.",
            code="shared-tensor",
            where=str(checkpoint.folder),
            fix="report the architecture",
        )
    return parts


def _stored_part(checkpoint: Checkpoint, part: Part, names: Sequence[str]) -> StoredPart:
    shape = part.shape
    ordered = tuple(sorted(names, key=dot_natural_key))
    shapes = {checkpoint.tensors[name].shape for name in ordered}
    each = shape if len(ordered) == 1 else shape[1:]
    if shapes == {each} and (len(ordered) == 1 or len(ordered) == shape[0]):
        return StoredPart(ordered)
    if shapes == {(*each[:-2], *each[:-3:-1])} and not part.is_bias and (len(ordered) == 1 or len(ordered) == shape[0]):
        return StoredPart(ordered, transposed=True)
    raise UserError(
        f"No tensor of the checkpoint corresponds to {part.name} {list(shape)}.",
        code="missing-tensors",
        where=str(checkpoint.folder),
        fix='set apply = "operators", which needs no checkpoint tensors; to export, report the architecture',
    )
