"""Apply operators with forward hooks, without changing the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from heretic.ablation.operator import Operator, StackedOperators, placed
from heretic.model.forward import trial_of_row
from heretic.model.patching import forward_hooks
from heretic.model.writer import ResidualWriter, first_tensor, with_first


@contextmanager
def apply_operators(writers: Sequence[ResidualWriter], *trials: Mapping[str, Operator]) -> Iterator[None]:
    """Apply the operators to the writers' outputs within the context.

    With several trials each row of a batch has its own (`model.forward.trial_of_row`). Nested contexts compose in the order
    in which they are entered.
    """
    by_writer = [(writer, [operators.get(writer.name) for operators in trials]) for writer in writers]
    edited = [(writer, named) for writer, named in by_writer if any(named)]
    operators = zip(edited, _on_their_devices(edited), strict=True)
    hooks = ((module, _hook(operator)) for (writer, _), operator in operators for module in writer.modules)
    with forward_hooks(hooks):
        yield


def _on_their_devices(
    edited: Sequence[tuple[ResidualWriter, Sequence[Operator | None]]],
) -> Sequence[Operator | StackedOperators]:
    """Return each writer's operators, stacked if there are several trials, on the devices that the writers run on."""
    devices = [writer.device or torch.device("cpu") for writer, _ in edited]
    if any(len(operators) > 1 for _, operators in edited):
        return placed([StackedOperators.of(operators) for _, operators in edited], devices)
    single = [operator for _, operators in edited for operator in operators if operator is not None]
    if any(operator.u.device.type != "cpu" for operator in single):
        return single
    return placed(single, devices)


def _hook(stacked: Operator | StackedOperators) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        nonlocal stacked
        written = first_tensor(output)
        read = None if stacked.a is None else inputs[0].to(written.device)
        if stacked.u.device != written.device:  # an offloaded writer, or one whose weights another device uses too
            stacked = stacked.to(written.device)
        if isinstance(stacked, Operator):
            return with_first(output, stacked(written, read))
        trials = trial_of_row.get()
        if trials is None:
            raise RuntimeError("several trials are applied, but trial_of_row is not set")
        return with_first(output, stacked(written, trials.on(written.device), read))

    return hook
