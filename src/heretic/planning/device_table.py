"""The user's own `device_map`, checked on the model without memory before anything is loaded."""

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
    """The user's table with its devices resolved; the model has so many decoder `blocks`.

    Raises UserError for a device or module that is not there, a tensor without a place, tied weights on different devices, and a
    block whose modules run on different devices.
    """
    resolved = {name: device_named(value, devices, "device_map").key for name, value in table.items()}
    _check_names(model, resolved)
    _check_complete(model, resolved)
    _check_ties(model, resolved)
    _check_blocks(model, resolved, blocks)
    return resolved


def _check_names(model: nn.Module, table: Table) -> None:
    """Accelerate only warns of a name that no module has, and the module that was meant goes elsewhere."""
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
    for name in model.state_dict():  # buffers that no checkpoint holds are put where they are used
        if lookup(table, name) is None:
            raise UserError(
                f"The table 'device_map' has no place for {name}.",
                code="module-without-device",
                where="device_map",
                fix=f'add "{name.rpartition(".")[0] or name}" = DEVICE, or "" = DEVICE for all the rest',
            )


def _check_ties(model: Any, table: Table) -> None:
    """A tied weight exists once, so all modules that use it must be where it is."""
    from accelerate.utils import find_tied_parameters

    for group in find_tied_parameters(model):
        embedding = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
        first, *others = sorted(group, key=lambda tensor: tensor.rpartition(".")[0] not in embedding)
        for other in others:
            if _runs_on(table, first) != _runs_on(table, other):
                one, two = first.rpartition(".")[0], other.rpartition(".")[0]
                raise UserError(
                    f"The table 'device_map' puts {one} and {two} on different devices, but they share one weight.",
                    code="tied-weights-parted",
                    where=f"device_map.{two}",
                    fix=f'"{two}" = {_toml(_runs_on(table, first))}, the device of {one}',
                )


def _check_blocks(model: nn.Module, table: Table, blocks: int) -> None:
    """Inside a block nobody moves tensors between devices: accelerate moves a module's inputs only."""
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
    """Where accelerate runs what a table puts there: what waits in RAM runs on the table's first GPU."""
    place = lookup(table, name)
    return next((p for p in table.values() if p != CPU), CPU) if place == CPU else place


def _toml(place: int | str | None) -> str:
    return f'"{place}"' if isinstance(place, str) else str(place)
