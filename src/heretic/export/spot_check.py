"""Check every edited tensor of a written model against a recomputed edit, on a sample of its columns.

The answers of the whole model cannot show that one of many writers was not edited, least of all if it is only loaded quantized.
So written tensors are compared with the definition of the edit, y' = n * (y - sum of u (w . y + a . x)), in float64, from the
original's file and the trial's operators: element by element, within what the number format rounds. Of the tensors that no edit is
for the first row must be the original's, bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.ablation.operator import Operator
from heretic.errors import VerificationFailed
from heretic.export.save import TensorEdit
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint
from heretic.progress import ProgressReporter

COLUMNS, PLACES = 32, 4  # so many columns side by side, at so many places of each matrix; 32 are a block of q8_0
HALF_A_STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24, torch.float64: 2**-53}
SMALLEST = {torch.float16: 2**-25}  # half a step below the normal numbers
COMPUTED = 1e-5  # relative error of sums in float32, over the terms of w . y


@dataclass(frozen=True)
class WrittenTensors:
    """What was written.

    `edits` are by the checkpoint's tensor names. `columns` reads those of a written tensor by the same name (None: a bias, as one
    column, or one an expert), for values that are expected: (values, how far rounding may have moved each). `untouched` reads
    tensors without edits, where they must be the original's.
    """

    edits: Mapping[str, TensorEdit]
    columns: Callable[[str, Columns | None, Tensor], tuple[Tensor, Tensor]]
    untouched: Callable[[str], Tensor] | None = None


@dataclass(frozen=True)
class Columns:
    """Columns `start` to `end` of a matrix [width, inputs], of one expert where there are several in a tensor; `turned`: stored
    the other way round."""

    start: int
    end: int
    expert: int | None = None
    turned: bool = False

    def of(self, tensor: object) -> Tensor:
        """These of a tensor or of a file's slice, upright [width, columns]."""
        where: list[int | slice] = [slice(None), slice(self.start, self.end)]
        if self.turned:
            where.reverse()
        index = tuple(where if self.expert is None else [self.expert, *where])
        found: Tensor = tensor[index]  # type: ignore[index]
        return found.mT if self.turned else found


def check_edits(
    checkpoint: Checkpoint,
    operators: Mapping[str, Operator],
    written: WrittenTensors,
    reporter: ProgressReporter,
    stop: StopSignal,
) -> int:
    """Check all edited tensors; returns their number. Raises VerificationFailed for a wrong tensor or an unused operator."""
    used = {id(edit.operator) for edit in written.edits.values()}
    if missing := [name for name, operator in operators.items() if id(operator) not in used]:
        raise _failed(missing[0], f"{len(missing)} of {len(operators)} edits were planned for no tensor")
    with reporter.stage("Checking the written tensors", len(checkpoint.tensors)) as stage:
        for name, info in checkpoint.tensors.items():
            stop.check()
            edit = written.edits.get(name)
            if edit is None:
                if written.untouched is not None and info.shape:
                    _same(checkpoint, name, written.untouched)
            elif edit.is_bias:
                _check(name, edit.operator, as_columns(checkpoint.read(name)), written, None)
            else:
                before = checkpoint.slice_of(name)
                for columns in _sample(name, info.shape, turned=edit.transposed):
                    _check(name, edit.operator, columns.of(before), written, columns)
            stage.advance()
    return len(written.edits)


def _check(name: str, operator: Operator, before: Tensor, written: WrittenTensors, columns: Columns | None) -> None:
    inputs = slice(columns.start, columns.end) if columns else None
    expected, error = expectation(operator.at_inputs(inputs), before)
    found, rounded = written.columns(name, columns, expected)
    off = (found.double() - expected).abs() - 1.05 * rounded - error
    if not bool((off <= 0).all()):
        worst = float((found.double() - expected).abs().max())
        raise _failed(name, f"it is off by up to {worst:.1e}, but rounding allows only {float(rounded.max()):.1e}")


def expectation(operator: Operator, before: Tensor) -> tuple[Tensor, Tensor]:
    """The edit of columns [width, columns] in float64, and how far arithmetic in float32 may be from it."""
    y, parts = before.double(), {name: t.double().cpu() for name, t in operator.parts.items()}
    u = torch.atleast_2d(parts["u"]).mT
    after, terms = y, y.abs()
    if "w" in parts:
        w = torch.atleast_2d(parts["w"])
        after, terms = after - u @ (w @ y), terms + u.abs() @ (w.abs() @ y.abs())
    if "a" in parts:
        a = torch.atleast_2d(parts["a"])
        after, terms = after - u @ a, terms + u.abs() @ a.abs()
    if "n" not in parts:
        return after, COMPUTED * terms
    n = parts["n"][:, None]
    return n * after, COMPUTED * n.abs() * terms


def as_columns(bias: Tensor) -> Tensor:
    """A bias [width] or [experts, width] as [width, 1 or experts]."""
    return bias.reshape(-1, bias.shape[-1]).mT


def rounding_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each value may be moved by being stored in this number format."""
    return (values.abs() * HALF_A_STEP[dtype]).clamp_min(SMALLEST.get(dtype, 0.0))


def _sample(name: str, shape: tuple[int, ...], *, turned: bool) -> list[Columns]:
    """Places of a matrix, others for every tensor; one of each expert's."""
    inputs = shape[-2] if turned else shape[-1]
    blocks = -(-inputs // COLUMNS)
    chosen = random.Random(name)
    experts = range(shape[0]) if len(shape) == 3 else [None]
    found = []
    for expert in experts:
        for block in chosen.sample(range(blocks), min(blocks, PLACES if expert is None else 1)):
            start = block * COLUMNS
            found.append(Columns(start, min(start + COLUMNS, inputs), expert, turned))
    return found


def _same(checkpoint: Checkpoint, name: str, untouched: Callable[[str], Tensor]) -> None:
    before, after = checkpoint.slice_of(name)[0:1], untouched(name)[0:1]
    if before.shape != after.shape or not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
        raise _failed(name, "it has no edit, but differs from the original")


def _failed(name: str, why: str) -> VerificationFailed:
    return VerificationFailed(
        f"The written model is wrong: {why}.",
        where=name,
        fix="report it with run.log: heretic or the disk has a fault; the study is kept",
    )
