"""A writer: a module whose output is added to the residual stream, and the parameters that its output is linear in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from heretic.model.lazy_tensor import LazyTensor, materialize
from heretic.model.quantization import dequantized, is_quantized


@dataclass(frozen=True)
class Part:
    """A parameter of a writer: a weight [width, inputs], a bias [width], or those of all experts at once [experts, ...].

    `transposed`: the last axis of the weight is the one along the stream ([..., inputs, width]).
    """

    name: str
    owner: nn.Module
    attribute: str
    is_bias: bool = False
    transposed: bool = False

    @property
    def tensor(self) -> Tensor:
        """The parameter itself."""
        return cast(Tensor, getattr(self.owner, self.attribute))

    @property
    def quantized(self) -> bool:
        """Whether the parameter is the weight of a quantized linear map."""
        return not self.is_bias and self.attribute == "weight" and is_quantized(self.owner)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as a weight, which a packed one does not have itself."""
        if self.quantized:
            owner = cast(nn.Linear, self.owner)
            return (owner.out_features, owner.in_features)
        return tuple(self.tensor.shape)

    def matrices(self, tensor: Tensor) -> Iterator[Tensor]:
        """Every matrix [width, inputs] of a tensor that is laid out as this weight is."""
        upright = tensor.mT if self.transposed else tensor
        yield from upright if upright.ndim == 3 else (upright,)


@dataclass(frozen=True)
class ResidualWriter:
    """A module whose output is added to the residual stream.

    Without `parts` it is a linear map with a weight and perhaps a bias. A mixture of experts is one writer with the parts of
    all its experts: as what it writes is the sum of theirs, weighted for each token, it is one wide matrix [width, inputs of all
    experts], of which a token uses some columns.
    """

    name: str
    layer: int
    component: str
    module: nn.Module
    norms: tuple[nn.Module, ...] = ()  # that its output passes before it is added (Gemma 2 and 3, OLMo 2)
    mixture: tuple[Part, ...] = ()
    tied_modules: tuple[nn.Module, ...] = ()  # modules of later blocks that have the same weights (Zamba)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules whose output is edited."""
        return (self.module, *self.tied_modules)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parameters that an edit of this writer is written into."""
        return self.mixture or linear_parts(self.name, self.module)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in, out] (GPT-2's Conv1D) instead of [out, in]."""
        return isinstance(self.module, Conv1D)

    @property
    def offloaded(self) -> bool:
        """Whether accelerate keeps the weights elsewhere between passes, leaving empty ones in the module."""
        return any(part.tensor.device.type == "meta" for part in self.parts)

    def weights(self) -> list[LazyTensor]:
        """The matrices [width of the stream, inputs] in their own type: one, or one an expert; of a quantized weight what makes it,
        so that it exists only while it is used.

        Under tensor parallelism the shares are put together, so that all processes must ask at the same time.
        """
        found: list[LazyTensor] = []
        for part in self.parts:
            if part.quantized:
                found.append(partial(dequantized, part.owner))
            elif not part.is_bias:
                found += part.matrices(full_tensor(part.tensor.detach()))
        return found

    def weight(self) -> Tensor:
        """The weight [width of the stream, inputs] in its own type; experts side by side."""
        found = [materialize(matrix) for matrix in self.weights()]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    @torch.no_grad()
    def scale(self) -> Tensor | None:
        """Effective weight [width] in float32 of the RMS norms that its output passes; None without one.

        Asked of the norms themselves, since some add 1 to what they store: for an input of ones it is the output.
        """
        found = [scale for norm in self.norms if (scale := _scale(norm)) is not None]
        return torch.stack(found).prod(dim=0) if found else None


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, also where this process holds a share of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def linear_parts(name: str, module: nn.Module) -> tuple[Part, ...]:
    """The weight of a linear map, and its bias if it has one."""
    weight = Part(f"{name}.weight", module, "weight", transposed=isinstance(module, Conv1D))
    has_bias = isinstance(getattr(module, "bias", None), Tensor)
    return (weight, Part(f"{name}.bias", module, "bias", is_bias=True)) if has_bias else (weight,)


def _scale(norm: nn.Module) -> Tensor | None:
    """None for a norm without a weight: it treats all components alike."""
    stored = next(norm.parameters(), None)
    if stored is None:
        return None
    away = stored.device.type == "meta"  # offloaded; accelerate brings it to where the norm runs
    device = cast(Any, norm)._hf_hook.execution_device if away else stored.device
    ones = torch.ones(1, 1, len(stored), dtype=stored.dtype, device=device)
    return cast(Tensor, norm(ones)[0, 0].float())


def first_tensor(output: Any) -> Tensor:
    """The tensor out of what a module returns: itself, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, tensor: Tensor) -> Any:
    """What a module returned, with another tensor in the place of its first."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])
