"""Apply operators with forward hooks, without changing the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from heretic.ablation.operator import Operator, StackedOperators
from heretic.model.forward import trial_of_row
from heretic.model.writer import ResidualWriter, first_tensor, with_first


@contextmanager
def apply_operators(writers: Sequence[ResidualWriter], *trials: Mapping[str, Operator]) -> Iterator[None]:
    """Apply the operators to the writers' outputs within the context.

    With several trials each row of a batch has its own (`model.forward.trial_of_row`). Nested contexts compose in the order
    in which they are entered.
    """
    handles = []
    try:
        for writer in writers:
            named = [operators.get(writer.name) for operators in trials]
            if any(named):
                handles += [module.register_forward_hook(_hook(named)) for module in writer.modules]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(operators: Sequence[Operator | None]) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    single = operators[0] if len(operators) == 1 else None
    stacked: Operator | StackedOperators = single or StackedOperators.of(operators)

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        nonlocal stacked
        written = first_tensor(output)
        if stacked.u.device != written.device:  # once per trial: the writers of a sharded model are on several devices
            stacked = stacked.to(written.device)
        if isinstance(stacked, Operator):
            return with_first(output, stacked(written))
        trials = trial_of_row.get()
        if trials is None:
            raise RuntimeError("several trials are applied, but trial_of_row is not set")
        return with_first(output, stacked(written, trials))

    return hook
