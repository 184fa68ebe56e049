"""Residual writers: modules whose output is added to the residual stream, and their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from heretic.model.lazy_tensor import LazyTensor, materialize
from heretic.model.quantization import dequantized, is_quantized


@dataclass(frozen=True)
class Part:
    """A parameter of a writer: a weight [width, inputs], a bias [width], or those of all experts [experts, ...]."""

    name: str
    owner: nn.Module
    attribute: str
    is_bias: bool = False
    transposed: bool = False  # the weight is stored [..., inputs, width]

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
        """Its shape when unpacked."""
        if self.quantized:
            owner = cast(nn.Linear, self.owner)
            return (owner.out_features, owner.in_features)
        return tuple(self.tensor.shape)

    def matrices(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield every matrix [width, inputs] of a tensor with this weight's layout."""
        upright = tensor.mT if self.transposed else tensor
        yield from upright if upright.ndim == 3 else (upright,)


@dataclass(frozen=True)
class ResidualWriter:
    """A module whose output is added to the residual stream; with `input_norm`, one that reads the stream and is edited too.

    Without `mixture` it is a linear layer with a weight and an optional bias. A mixture of experts is one writer with the parts of
    all its experts: its output is a weighted sum of theirs, so it is one matrix [width, inputs of all experts], of which each token
    uses some columns.
    """

    name: str
    layer: int
    component: str
    module: nn.Module
    norms: tuple[nn.Module, ...] = ()  # between its output and the stream (Gemma 2 and 3, OLMo 2)
    mixture: tuple[Part, ...] = ()
    tied_modules: tuple[nn.Module, ...] = ()  # modules of later blocks with the same weights (Zamba)
    input_norm: nn.Module | None = None  # of a module that reads the stream: the norm before it

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules whose output is edited."""
        return (self.module, *self.tied_modules)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parameters that an edit changes."""
        return self.mixture or linear_parts(self.name, self.module)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in, out] (GPT-2's Conv1D) instead of [out, in]."""
        return isinstance(self.module, Conv1D)

    @property
    def offloaded(self) -> bool:
        """Whether accelerate offloads the weights between passes."""
        return any(part.tensor.device.type == "meta" for part in self.parts)

    @property
    def device(self) -> torch.device | None:
        """The device of the weights; None if they are offloaded between passes."""
        devices = [part.tensor.device for part in self.parts]
        return devices[0] if devices and devices[0].type != "meta" else None

    def weights(self) -> list[LazyTensor]:
        """Return the matrices [width, inputs] in their own dtype: one, or one an expert; quantized ones as functions."""
        matrices: list[LazyTensor] = []
        for part in self.parts:
            if part.quantized:
                matrices.append(partial(dequantized, part.owner))
            elif not part.is_bias:
                matrices += part.matrices(part.tensor.detach())
        return matrices

    def weight(self) -> Tensor:
        """Return the weight [width, inputs] in its own dtype; experts side by side."""
        matrices = [materialize(matrix) for matrix in self.weights()]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=1)

    @property
    def reads_stream(self) -> bool:
        """Whether it reads the stream instead of writing to it."""
        return self.input_norm is not None

    @torch.no_grad()
    def scale(self) -> Tensor | None:
        """Return the effective weight [width] in float32 of the RMS norms after its output, of a reader before its input.

        It is the norm's output for ones, since some norms add 1 to the stored weight. None without a norm.
        """
        norms = self.norms if self.input_norm is None else (self.input_norm,)
        scales = [scale for norm in norms if (scale := scale_of(norm)) is not None]
        return torch.stack(scales).prod(dim=0) if scales else None


def output_width(module: nn.Module) -> int | None:
    """Output width of a linear layer, quantized ones included; None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.nf)
    width = getattr(module, "out_features", None)
    return width if isinstance(width, int) and getattr(module, "weight", None) is not None else None


def linear_parts(name: str, module: nn.Module) -> tuple[Part, ...]:
    """Return the weight of a linear layer, and its bias if it has one."""
    weight = Part(f"{name}.weight", module, "weight", transposed=isinstance(module, Conv1D))
    has_bias = isinstance(getattr(module, "bias", None), Tensor)
    return (weight, Part(f"{name}.bias", module, "bias", is_bias=True)) if has_bias else (weight,)


def scale_of(norm: nn.Module) -> Tensor | None:
    """Return the effective weight [width] of a norm in float32; None without one."""
    stored = next(norm.parameters(), None)
    if stored is None:
        return None
    offloaded = stored.device.type == "meta"  # offloaded; accelerate moves it to the execution device
    device = cast(Any, norm)._hf_hook.execution_device if offloaded else stored.device
    ones = torch.ones(1, 1, len(stored), dtype=stored.dtype, device=device)
    return cast(Tensor, norm(ones)[0, 0].float())


def first_tensor(output: Any) -> Tensor:
    """Return a module's output tensor: the output itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, tensor: Tensor) -> Any:
    """Return a module's output with its first tensor replaced."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])
