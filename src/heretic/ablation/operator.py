"""The ablation of one writer y = W x + b, as an operator: y' = n * (y - u (w . y + a . x)), or with the sum of several terms.

`geometries/` has the functions that return u, w, n and a for a direction and a strength. For orthonormal v_j the product of all
(I - s v_j v_jT) is I - s VT V with V [k, width]: one operator with k rows in u and w.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from heretic.ablation.weight_stats import ELEMENTS_PER_CHUNK
from heretic.model.transfer import to_devices, to_host


@dataclass(frozen=True)
class Operator:
    """u, w, n and a of one writer in float32; without `w` or `a` the operator does not read the output or the input."""

    u: Tensor  # [width], or [k, width] for k directions
    w: Tensor | None  # like u
    n: Tensor | None = None  # [width]; None: no scaling
    a: Tensor | None = None  # [inputs], or [k, inputs]

    def __call__(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """Apply to outputs [..., width] for inputs [..., inputs], in float32; the result has the dtype of `y`.

        Operators without `a` need no inputs.
        """
        full = y.to(torch.promote_types(y.dtype, torch.float32))
        edited = full
        if self.w is not None:
            edited = edited - (full @ torch.atleast_2d(self.w).mT) @ torch.atleast_2d(self.u)
        if self.a is not None:
            assert x is not None, "an operator with `a` needs the writer's inputs"
            read = _InnerProducts.apply(x.reshape(-1, x.shape[-1]), torch.atleast_2d(self.a))
            edited = edited - (read @ torch.atleast_2d(self.u)).view(full.shape)
        if self.n is not None:
            edited = edited * self.n
        return edited.to(y.dtype)

    def reads(self, weight: Tensor) -> Tensor:
        """Return what the operator reads from the inputs of a weight [width, inputs], w^T W + a [k, inputs] in float32."""
        parts = [] if self.w is None else [torch.atleast_2d(self.w) @ weight.float()]
        parts += [] if self.a is None else [torch.atleast_2d(self.a)]
        return functools.reduce(torch.add, parts)

    def on_weight(self, weight: Tensor) -> Tensor:
        """Apply to a weight [width, inputs], in float32."""
        edited = weight.float() - torch.atleast_2d(self.u).mT @ self.reads(weight)
        if self.n is not None:
            edited = edited * self.n.unsqueeze(-1)
        return edited

    def on_bias(self, bias: Tensor) -> Tensor:
        """Apply to a bias [..., width], which the inputs do not reach."""
        return self.at_inputs(None)(bias)

    def at_inputs(self, columns: slice | None) -> Operator:
        """Return the operator on some columns of the weight; None: on the bias."""
        if self.a is None:
            return self
        return replace(self, a=None if columns is None else self.a[..., columns])

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that the operator has, by name."""
        return _parts(self)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the operator has."""
        return list(self.parts.values())

    def as_leaf(self) -> Operator:
        """Return a detached copy; those of its tensors that have gradients collect their own."""
        return replace(self, **{name: t.detach().requires_grad_(t.requires_grad) for name, t in self.parts.items()})

    def to(self, device: torch.device | str) -> Operator:
        """Move the operator to a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.parts.items()})


@dataclass(frozen=True)
class StackedOperators:
    """The operators of several trials for one writer in float32; each row of a batch uses its own.

    Shapes: u and w [trials, k, width], n [trials, width], a [trials, k, inputs].
    """

    u: Tensor
    w: Tensor | None
    n: Tensor | None = None
    a: Tensor | None = None

    @classmethod
    def of(cls, operators: Sequence[Operator | None]) -> StackedOperators:
        """Stack operators, at least one of them not None; None leaves its rows unedited."""
        some = [o for o in operators if o is not None]
        most = max(len(torch.atleast_2d(o.u)) for o in some)

        def stacked(name: str) -> Tensor | None:
            """Stack one tensor of all operators, padded with rows of zeros to the largest number of directions."""
            found = [None if o is None else o.parts.get(name) for o in operators]
            known = next((t for t in found if t is not None), None)
            if known is None:
                return None
            matrices = [known.new_zeros(0, known.shape[-1]) if t is None else torch.atleast_2d(t) for t in found]
            return torch.stack([torch.cat([m, m.new_zeros(most - len(m), m.shape[1])]) for m in matrices])

        ones = some[0].u.new_ones(some[0].u.shape[-1])
        scaled = any(o.n is not None for o in some)
        n = torch.stack([ones if o is None or o.n is None else o.n for o in operators]) if scaled else None
        u = stacked("u")
        assert u is not None
        return cls(u, stacked("w"), n, stacked("a"))

    def __call__(self, y: Tensor, trial_of_row: Tensor, x: Tensor | None = None) -> Tensor:
        """Apply to outputs [rows, ..., width] (or [rows * tokens, width], as in the MLPs of some models).

        `trial_of_row` [rows] is on the device of the outputs.
        """
        full = y.float().view(len(trial_of_row), -1, y.shape[-1])
        edited = full
        if self.w is not None:
            edited = edited - (full @ self.w[trial_of_row].mT) @ self.u[trial_of_row]
        if self.a is not None:
            assert x is not None, "an operator with `a` needs the writer's inputs"
            inputs = x.reshape(len(trial_of_row), -1, x.shape[-1])
            rows = max(1, ELEMENTS_PER_CHUNK // inputs[0].numel())
            parts = zip(inputs.split(rows), self.a[trial_of_row].split(rows), strict=True)
            edited = edited - torch.cat([part.float() @ a.mT for part, a in parts]) @ self.u[trial_of_row]
        if self.n is not None:
            edited = edited * self.n[trial_of_row].unsqueeze(1)
        return edited.to(y.dtype).view(y.shape)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that the operators have, by name."""
        return _parts(self)

    def to(self, device: torch.device | str) -> StackedOperators:
        """Move the operators to a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.parts.items()})


class _InnerProducts(torch.autograd.Function):
    """x [tokens, inputs], a [k, inputs] -> x aT [tokens, k] in float32 or better.

    It keeps the inputs for the gradient in their own number format, and converts a part of them at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        wide = torch.promote_types(x.dtype, a.dtype)
        return torch.cat([part.to(wide) @ a.to(wide).mT for part in x.split(_rows_at_once(x))])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, a = ctx.saved_tensors
        of_x, of_a = None, None
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(x)
            for part, own in zip(of_x.split(_rows_at_once(x)), gradient.split(_rows_at_once(x)), strict=True):
                part.copy_(own @ a.to(gradient.dtype))
        if ctx.needs_input_grad[1]:
            of_a = torch.zeros_like(a, dtype=gradient.dtype)
            for part, own in zip(x.split(_rows_at_once(x)), gradient.split(_rows_at_once(x)), strict=True):
                of_a += own.mT @ part.to(gradient.dtype)
            of_a = of_a.to(a.dtype)
        return of_x, of_a


def _rows_at_once(x: Tensor) -> int:
    return max(1, ELEMENTS_PER_CHUNK // x.shape[-1])


def _parts(operator: Operator | StackedOperators) -> dict[str, Tensor]:
    return {f.name: tensor for f in fields(operator) if (tensor := getattr(operator, f.name)) is not None}


Placed = TypeVar("Placed", Operator, StackedOperators)


def placed(operators: Sequence[Placed], devices: Sequence[torch.device]) -> list[Placed]:
    """Copy operators from RAM to their devices, all together: the copies do not make the host wait. Differentiable."""
    parts = [o.parts for o in operators]
    flat = [t for own in parts for t in own.values()]
    moved = iter(to_devices(flat, [device for own, device in zip(parts, devices, strict=True) for _ in own]))
    return [replace(o, **{name: next(moved) for name in own}) for o, own in zip(operators, parts, strict=True)]


def in_ram(operators: Sequence[Operator]) -> list[Operator]:
    """Copy operators to RAM, with one wait for all GPUs."""
    moved = iter(to_host([t for o in operators for t in o.tensors]))
    return [replace(o, **{name: next(moved) for name in o.parts}) for o in operators]
