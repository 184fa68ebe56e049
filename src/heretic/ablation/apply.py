"""Applying operators while the model runs, with the weights untouched."""

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
    """Within the context every writer named in the operators of a trial writes what its operator makes of its output.

    With several trials each row of a batch is edited by its own (`model.forward.trial_of_row` says which).
    Hooks only, removed on the way out whatever happens; several contexts compose in the order in which they are entered.
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
        if stacked.u.device != written.device:  # once a trial: a sharded model's writers lie on several devices
            stacked = stacked.to(written.device)
        if isinstance(stacked, Operator):
            return with_first(output, stacked(written))
        trials = trial_of_row.get()
        if trials is None:
            raise RuntimeError("several trials are attached, but the pass does not say which row belongs to which")
        return with_first(output, stacked(written, trials))

    return hook
