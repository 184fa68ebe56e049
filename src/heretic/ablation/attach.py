"""Applying operators while the model runs, with the weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from heretic.ablation.operator import Operator
from heretic.model.anatomy import Writer


@contextmanager
def attach(writers: Sequence[Writer], operators: Mapping[str, Operator]) -> Iterator[None]:
    """Within the context every writer named in `operators` writes what its operator makes of its output.

    Hooks only, removed on the way out whatever happens; several contexts compose in the order in which they are entered.
    """
    handles = []
    try:
        for writer in writers:
            if writer.name in operators:
                handles.append(writer.module.register_forward_hook(_hook(operators[writer.name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(operator: Operator) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    moved = operator

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal moved
        if moved.u.device != output.device:  # once a trial: a sharded model's writers lie on several devices
            moved = moved.to(output.device)
        return moved(output)

    return hook
