"""The ablation of one writer, as an operator on its output: y' = n * (y - u (w . y)), or with the sum of several u (w . y).

Each geometry is one function that returns u, w and n for a direction and a strength. `WeightStats` are computed once per study.
For orthonormal v_j the product of all (I - s v_j v_jT) is I - s VT V with V [k, width]: one operator with k rows in u and w.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from heretic.model.lazy_tensor import LazyTensor, materialize
from heretic.model.transfer import to_device, to_devices, to_host

# Rows of a weight with a smaller norm count as zero, so that D^-1 stays finite.
TINY = 1e-12
ELEMENTS_PER_CHUNK = 2**24  # of a weight, in float32: 64 MiB


@dataclass(frozen=True)
class Operator:
    """u, w and n of one writer in float32."""

    u: Tensor  # [width], or [k, width] for k directions
    w: Tensor  # like u
    n: Tensor | None = None  # [width]; None: no scaling

    def __call__(self, y: Tensor) -> Tensor:
        """Apply to outputs [..., width], in float32 or better; the result has the dtype of `y`."""
        full = y.to(torch.promote_types(y.dtype, torch.float32))
        edited = full - (full @ torch.atleast_2d(self.w).mT) @ torch.atleast_2d(self.u)
        if self.n is not None:
            edited = edited * self.n
        return edited.to(y.dtype)

    def on_weight(self, weight: Tensor) -> Tensor:
        """Apply to a weight [width, inputs], in float32."""
        edited = weight.float() - torch.atleast_2d(self.u).mT @ (torch.atleast_2d(self.w) @ weight.float())
        if self.n is not None:
            edited = edited * self.n.unsqueeze(-1)
        return edited

    @property
    def tensors(self) -> list[Tensor]:
        """Return u, w and, if there is one, n."""
        return [t for t in (self.u, self.w, self.n) if t is not None]

    def as_leaf(self) -> Operator:
        """Return a detached copy; those of its tensors that have gradients collect their own."""
        u, w, n = (None if t is None else t.detach().requires_grad_(t.requires_grad) for t in (self.u, self.w, self.n))
        assert u is not None and w is not None
        return Operator(u, w, n)

    def to(self, device: torch.device | str) -> Operator:
        """Move the operator to a device."""
        return Operator(self.u.to(device), self.w.to(device), None if self.n is None else self.n.to(device))


@dataclass(frozen=True)
class StackedOperators:
    """The operators of several trials for one writer in float32; each row of a batch uses its own.

    Shapes: u and w [trials, k, width], n [trials, width].
    """

    u: Tensor
    w: Tensor
    n: Tensor | None

    @classmethod
    def of(cls, operators: Sequence[Operator | None]) -> StackedOperators:
        """Stack operators, at least one of them not None; None leaves its rows unedited."""
        some = next(o for o in operators if o is not None)
        most = max(len(torch.atleast_2d(o.u)) for o in operators if o is not None)
        nothing, ones = some.u.new_zeros(most, some.u.shape[-1]), some.u.new_ones(some.u.shape[-1])

        def rows(of: Tensor) -> Tensor:
            """Pad with rows of zeros to the largest number of directions."""
            matrix = torch.atleast_2d(of)
            return torch.cat([matrix, nothing[len(matrix) :]])

        return cls(
            torch.stack([nothing if o is None else rows(o.u) for o in operators]),
            torch.stack([nothing if o is None else rows(o.w) for o in operators]),
            None
            if all(o is None or o.n is None for o in operators)
            else torch.stack([ones if o is None or o.n is None else o.n for o in operators]),
        )

    def __call__(self, y: Tensor, trial_of_row: Tensor) -> Tensor:
        """Apply to outputs [rows, ..., width] (or [rows * tokens, width], as in the MLPs of some models)."""
        trial = trial_of_row.to(y.device)
        full = y.float().view(len(trial), -1, y.shape[-1])
        edited = full - (full @ self.w[trial].mT) @ self.u[trial]
        if self.n is not None:
            edited = edited * self.n[trial].unsqueeze(1)
        return edited.to(y.dtype).view(y.shape)

    @property
    def tensors(self) -> list[Tensor]:
        """Return u, w and, if there is one, n."""
        return [t for t in (self.u, self.w, self.n) if t is not None]

    def to(self, device: torch.device | str) -> StackedOperators:
        """Move the operators to a device."""
        return StackedOperators(self.u.to(device), self.w.to(device), None if self.n is None else self.n.to(device))


Placed = TypeVar("Placed", Operator, StackedOperators)


def placed(operators: Sequence[Placed], devices: Sequence[torch.device]) -> list[Placed]:
    """Copy operators from RAM to their devices, all together: the copies do not make the host wait. Differentiable."""
    parts = [o.tensors for o in operators]
    flat = [t for own in parts for t in own]
    moved = iter(to_devices(flat, [device for own, device in zip(parts, devices, strict=True) for _ in own]))
    return [type(o)(next(moved), next(moved), None if o.n is None else next(moved)) for o in operators]


def in_ram(operators: Sequence[Operator]) -> list[Operator]:
    """Copy operators to RAM, with one wait for all GPUs."""
    moved = iter(to_host([t for o in operators for t in o.tensors]))
    return [Operator(next(moved), next(moved), None if o.n is None else next(moved)) for o in operators]


@dataclass(frozen=True)
class WeightStats:
    """Statistics of one writer's weight W [width, inputs] for k directions V [k, width].

    The experts of a MoE writer count as one W, side by side: the operator edits their sum. With Wn = W / D and a = V Wn, `g` and
    `gram` suffice for any mix of the directions.
    """

    norms: Tensor  # D, the norms of W's rows [width]
    g: Tensor  # (Wn a^T)^T [k, width]
    gram: Tensor  # a a^T [k, k]

    def to(self, device: torch.device | str) -> WeightStats:
        """Move the statistics to a device."""
        return replace(self, norms=self.norms.to(device), g=self.g.to(device), gram=self.gram.to(device))


@torch.no_grad()
def weight_statistics(weight: Tensor | Sequence[LazyTensor], directions: Tensor, rows_at_once: int = 0) -> WeightStats:
    """Compute the statistics of a weight [width, inputs], or of several side by side, for directions [k, width].

    Only `rows_at_once` rows exist in float32 at a time (0: `ELEMENTS_PER_CHUNK` elements).
    """
    matrices = [weight] if isinstance(weight, Tensor) else weight
    squares = [_squared_norms(materialize(m), rows_at_once) for m in matrices]
    norms = _sum(s.to(squares[0].device) for s in squares).sqrt().clamp_min(TINY)
    g = torch.zeros(len(directions), len(norms), device=norms.device)
    gram = torch.zeros(len(directions), len(directions), device=norms.device)
    for matrix in map(materialize, matrices):
        d = norms.to(matrix.device)
        unit = directions.to(matrix.device) / d
        a = _sum(unit[:, rows] @ matrix[rows].float() for rows in _rows(matrix, rows_at_once))
        for rows in _rows(matrix, rows_at_once):
            g[:, rows] += (a @ matrix[rows].float().T / d[rows]).to(g.device)
        gram += (a @ a.T).to(gram.device)
    return WeightStats(norms, g, gram)


def _squared_norms(matrix: Tensor, rows_at_once: int) -> Tensor:
    return torch.cat([matrix[rows].float().square().sum(dim=1) for rows in _rows(matrix, rows_at_once)])


def _rows(matrix: Tensor, rows_at_once: int) -> list[slice]:
    count = rows_at_once or max(1, ELEMENTS_PER_CHUNK // matrix.shape[1])
    return [slice(start, start + count) for start in range(0, len(matrix), count)]


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


class _WeightProduct(torch.autograd.Function):
    """x -> W W^T x for vectors x [width] or [k, width]. It is symmetric and thus its own derivative, so nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Sequence[LazyTensor]) -> Tensor:
        ctx.matrices = matrices
        return _sum(_weight_product(x, materialize(m)) for m in matrices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(_weight_product(gradient, materialize(m)) for m in ctx.matrices), None


def _weight_product(x: Tensor, matrix: Tensor, rows_at_once: int = 0) -> Tensor:
    here = to_device(x, matrix.device)
    a = _sum(here[..., rows] @ matrix[rows].to(x.dtype) for rows in _rows(matrix, rows_at_once))
    return torch.cat([a @ matrix[rows].to(x.dtype).mT for rows in _rows(matrix, rows_at_once)], dim=-1).to(x.device)


def stats_for_directions(v: Tensor, weight: Tensor | Sequence[LazyTensor], norms: Tensor) -> WeightStats:
    """Compute statistics as `weight_statistics`, from known row norms, for directions [width] or [k, width] with gradients."""
    g = _WeightProduct.apply(v / norms, [weight] if isinstance(weight, Tensor) else weight) / norms
    v, g = torch.atleast_2d(v), torch.atleast_2d(g)
    return WeightStats(norms, g, v @ g.mT)


# In all geometries v is [width], or [k, width] for k orthogonal directions; mix has its coefficients in the directions of the
# statistics: [directions] or [k, directions].


def plain(v: Tensor, strength: float | Tensor, facts: WeightStats | None, mix: Tensor) -> Operator:
    """(I - s v vT) W."""
    return Operator(strength * v, v)


def row_normalized(v: Tensor, strength: float | Tensor, facts: WeightStats | None, mix: Tensor) -> Operator:
    """D (I - s v vT) D^-1 W, D the norms of W's rows."""
    assert facts is not None
    return Operator(strength * facts.norms * v, v / facts.norms)


def norm_preserving(v: Tensor, strength: float | Tensor, facts: WeightStats | None, mix: Tensor) -> Operator:
    """`row_normalized`, then every row scaled back to its old norm: N_i^2 = 1 - 2 s v_i . g_i + s^2 v_i A v_i, v_i and g_i being
    the k directions' i-th components, and A = a aT [k, k]."""
    assert facts is not None
    rows, made_of = torch.atleast_2d(v), torch.atleast_2d(mix)
    along = (rows * (made_of @ facts.g)).sum(dim=0)
    across = (rows * ((made_of @ facts.gram @ made_of.mT) @ rows)).sum(dim=0)
    squared = 1 - 2 * strength * along + strength**2 * across
    return Operator(strength * facts.norms * v, v / facts.norms, squared.clamp_min(TINY).rsqrt())


Geometry = Callable[[Tensor, "float | Tensor", "WeightStats | None", Tensor], Operator]
GEOMETRIES: dict[str, Geometry] = {"plain": plain, "row_normalized": row_normalized, "norm_preserving": norm_preserving}
NEEDS_WEIGHT_STATS = {"row_normalized", "norm_preserving"}
