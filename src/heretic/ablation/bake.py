"""Writing operators into weights: in memory for a trial, or tensor by tensor for an export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from heretic.ablation.operator import Operator
from heretic.errors import UserError
from heretic.model.anatomy import Writer
from heretic.model.checkpoint import Checkpoint


def bake_weight(operator: Operator, weight: Tensor, *, transposed: bool) -> Tensor:
    """A weight with the operator written into it: computed in float32, returned in the weight's type and layout."""
    full = weight.T if transposed else weight
    baked = operator.on_weight(full)
    return (baked.T if transposed else baked).to(weight.dtype).contiguous()


def bake_bias(operator: Operator, bias: Tensor) -> Tensor:
    """A bias [width] with the operator written into it; the bias is part of what is written to the stream."""
    return operator(bias.float()).to(bias.dtype)


Original = Callable[[str], Tensor]


@contextmanager
@torch.no_grad()
def rewrite(writers: Sequence[Writer], operators: Mapping[str, Operator], original: Original) -> Iterator[None]:
    """Within the context the weights themselves are edited; on the way out they are what `original` says, bit for bit.

    `original` gives a parameter's tensor by its name in the model: from a copy (`copies`) or from the files
    (`from_checkpoint`).
    """
    touched: list[tuple[str, Tensor]] = []
    try:
        for writer in writers:
            operator = operators.get(writer.name)
            if operator is None:
                continue
            weight, bias = writer.module.weight, getattr(writer.module, "bias", None)
            if not isinstance(weight, Tensor) or not weight.is_floating_point() or writer.offloaded:
                raise UserError(
                    f"The weight of {writer.name} cannot be rewritten.",
                    fix='apply = "operators" works with every weight',
                )
            operator = operator.to(weight.device)
            touched.append((f"{writer.name}.weight", weight))
            weight.copy_(bake_weight(operator, weight, transposed=writer.transposed))
            if isinstance(bias, Tensor):
                touched.append((f"{writer.name}.bias", bias))
                bias.copy_(bake_bias(operator, bias))
        yield
    finally:
        for name, parameter in touched:
            parameter.copy_(original(name))


def copies(writers: Sequence[Writer]) -> Original:
    """Keep a copy of the writers' tensors, each on its own device; nothing else of the model is copied."""
    kept = {}
    for writer in writers:
        for part in ("weight", "bias"):
            if isinstance(tensor := getattr(writer.module, part, None), Tensor):
                kept[f"{writer.name}.{part}"] = tensor.detach().clone()
    return kept.__getitem__


def from_checkpoint(checkpoint: Checkpoint, writers: Sequence[Writer]) -> Original:
    """Read the tensors again from the checkpoint's files when they are wanted. Raises UserError if names do not match."""
    names = checkpoint_names(checkpoint, writers)
    return lambda name: checkpoint.read(names[name])


def checkpoint_names(checkpoint: Checkpoint, writers: Sequence[Writer]) -> dict[str, str]:
    """Which tensor of the checkpoint each writer's parameter came from.

    Names mostly agree; where a checkpoint was saved with or without an outer module (GPT-2's `transformer.`), the longest
    common ending of the name decides, and it must be the only one of this shape.
    """
    found = {}
    for writer in writers:
        for part in ("weight", "bias"):
            tensor = getattr(writer.module, part, None)
            if isinstance(tensor, Tensor):
                name = f"{writer.name}.{part}"
                found[name] = _match(name, tuple(tensor.shape), checkpoint)
    if len(set(found.values())) != len(found):
        raise UserError("Two writers seem to come from one tensor of the checkpoint.", where=str(checkpoint.folder))
    return found


def _match(name: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> str:
    parts = name.split(".")
    for start in range(len(parts)):
        ending = ".".join(parts[start:])
        hits = [t for t in checkpoint.tensors if t == ending or t.endswith("." + ending)]
        if ending in hits:
            hits = [ending]
        if len(hits) == 1 and checkpoint.tensors[hits[0]].shape == shape:
            return hits[0]
        if hits:
            break
    raise UserError(
        f"No tensor of the checkpoint corresponds to {name} {list(shape)}.",
        where=str(checkpoint.folder),
        fix='apply = "operators" needs no checkpoint tensors; for the export, report the architecture',
    )
