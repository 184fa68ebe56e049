"""Check a user's `device_map` table on the meta model, before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from heretic.errors import UserError
from heretic.hardware.devices import CPU, Device
from heretic.planning.placement import block_names, device_named, lookup

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Table = Mapping[str, int | str]


def explicit(model: PreTrainedModel, table: Table, devices: Sequence[Device], blocks: int) -> dict[str, int | str]:
    """Return the user's table with its devices resolved.

    Args:
        model: the meta model.
        table: devices by module name.
        devices: the available devices.
        blocks: number of decoder blocks.

    Raises:
        UserError: for an unknown device or module, a tensor without a device, tied weights on different devices, or a block
            whose modules run on different devices.
    """
    resolved = {name: device_named(value, devices, "device_map").key for name, value in table.items()}
    _check_names(model, resolved)
    _check_complete(model, resolved)
    _check_ties(model, resolved)
    _check_blocks(model, resolved, blocks)
    return resolved


def _check_names(model: nn.Module, table: Table) -> None:
    """Refuse unknown module names, for which accelerate only prints a warning."""
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())]
    for name in table:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"The table 'device_map' names {name!r}, which {type(model).__name__} does not have.",
            code="unknown-module",
            where=f"device_map.{name}",
            fix=f"did you mean {near[0]!r}?" if near else "remove the line",
        )


def _check_complete(model: nn.Module, table: Table) -> None:
    for name in model.state_dict():  # buffers outside the checkpoint follow the modules that use them
        if lookup(table, name) is None:
            raise UserError(
                f"The table 'device_map' has no device for {name}.",
                code="module-without-device",
                where="device_map",
                fix=f'add "{name.rpartition(".")[0] or name}" = DEVICE, or "" = DEVICE for all the rest',
            )


def _check_ties(model: Any, table: Table) -> None:
    """Refuse tied weights on different devices: a tied weight exists only once."""
    from accelerate.utils import find_tied_parameters

    for group in find_tied_parameters(model):
        embedding = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
        first, *others = sorted(group, key=lambda tensor: tensor.rpartition(".")[0] not in embedding)
        for other in others:
            if _runs_on(table, first) != _runs_on(table, other):
                tied, module = first.rpartition(".")[0], other.rpartition(".")[0]
                raise UserError(
                    f"The table 'device_map' puts {tied} and {module} on different devices, but they share one weight.",
                    code="tied-weights-parted",
                    where=f"device_map.{module}",
                    fix=f'"{module}" = {_toml(_runs_on(table, first))}, the device of {tied}',
                )


def _check_blocks(model: nn.Module, table: Table, blocks: int) -> None:
    """Refuse a block on several devices: accelerate only moves a module's inputs, not tensors inside a block."""
    for block in block_names(model, blocks):
        tensors = [f"{block}.{name}" for name in model.get_submodule(block).state_dict()]
        places = {_runs_on(table, name) for name in tensors}
        if len(places) > 1:
            inside = next(name for name in table if name.startswith(f"{block}."))
            raise UserError(
                f"The table 'device_map' spreads {block} over several devices, but a block runs on one.",
                code="block-on-several-devices",
                where=f"device_map.{inside}",
                fix=f'one line for the whole block: "{block}" = {_toml(_runs_on(table, tensors[0]))}',
            )


def _runs_on(table: Table, name: str) -> int | str | None:
    """Return the device that runs a module; modules in RAM run on the table's first GPU."""
    place = lookup(table, name)
    return next((p for p in table.values() if p != CPU), CPU) if place == CPU else place


def _toml(place: int | str | None) -> str:
    return f'"{place}"' if isinstance(place, str) else str(place)
