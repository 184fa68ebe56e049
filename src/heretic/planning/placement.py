"""Place the modules of a meta model on devices.

`planned` and accelerate's modes become a table from module names to devices, which the loader uses unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from heretic.errors import UserError
from heretic.hardware.devices import Device

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

UNPLACED = "disk"  # accelerate's name for modules that fit on no device
MODES = ("planned", "auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class DeviceShare:
    """The part of a model on one device."""

    weights: int = 0  # bytes
    blocks: list[int] = field(default_factory=list)  # indices of decoder blocks
    embedding: bool = False
    head: bool = False

    def describe(self) -> str:
        """Describe the share, for example 'embedding, blocks 0-11'."""
        parts = ["embedding"] if self.embedding else []
        if self.blocks:
            parts.append(f"blocks {_ranges(self.blocks)}")
        return ", ".join(parts + (["head"] if self.head else [])) or "other modules"


def _ranges(numbers: Sequence[int]) -> str:
    """Format [0, 1, 2, 5] as '0-2, 5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


def device_named(value: int | str, devices: Sequence[Device], setting: str) -> Device:
    """Return the device that a setting names (`0`, `cuda`, `cuda:0`, `mps`, `cpu`). Raises UserError with the available ones."""
    for device in devices:
        if device.is_called(value):
            return device
    available = ", ".join(device.name for device in devices)
    raise UserError(
        f"The setting '{setting}' has an unknown device: {value!r}.",
        code="device-not-there",
        where=setting,
        fix=f"use one of: {available}",
    )


def weight_limits(max_memory: Mapping[str, str], devices: Sequence[Device]) -> dict[str, int]:
    """Return the setting `max_memory` in bytes by device name; other devices have no limit."""
    from accelerate.utils import convert_file_size_to_int

    limits = {}
    for name, size in max_memory.items():
        try:
            limits[device_named(name, devices, "max_memory").name] = convert_file_size_to_int(size)
        except ValueError:
            raise UserError(
                f"The setting 'max_memory' has an invalid size for {name}: {size!r}.",
                code="invalid-size",
                where=f"max_memory.{name}",
                fix='write it like "20GiB"',
            ) from None
    return limits


def everything_on(device: Device) -> dict[str, int | str]:
    """Return the table that puts the whole model on one device."""
    return {"": device.key}


def infer_device_map(
    model: PreTrainedModel,
    mode: str,
    room: Mapping[str, int],
    devices: Sequence[Device],
    fewer: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, int | str]:
    """Place the modules with accelerate.

    Args:
        model: the meta model.
        mode: `auto`, `balanced`, `balanced_low_0` or `sequential`.
        room: bytes for weights by device name.
        devices: the devices.
        fewer: bytes per element of quantized parameters, by name.

    Returns:
        Devices by module name; modules that fit nowhere are on "disk".
    """
    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, get_balanced_memory

    unsplit = list(getattr(model, "_no_split_modules", None) or [])
    # Accelerate counts GPUs from 0 without gaps, which a GPU that is left out makes.
    placed = [device for device in devices if device.name in room]
    keys = [device.key for device in placed if isinstance(device.key, int)]
    own: dict[int | str, int] = {key: i for i, key in enumerate(keys)}
    limits: dict[int | str, int] = {own.get(device.key, device.key): room[device.name] for device in placed}
    # Accelerate only knows whole bits: 4.1 bits count as 4. The headroom covers the difference.
    kinds: Any = {name: CustomDtype.INT4 if size < 0.75 else torch.int8 for name, size in fewer.items()}
    with _without_warnings():
        if mode != "sequential":
            limits = get_balanced_memory(
                model,
                max_memory=limits,
                no_split_module_classes=unsplit,
                special_dtypes=kinds,
                low_zero=mode == "balanced_low_0",
            )
        inferred = infer_auto_device_map(
            model, max_memory=limits, no_split_module_classes=unsplit, special_dtypes=kinds
        )
    table: dict[str, int | str] = {
        name: keys[place] if isinstance(place, int) else place for name, place in inferred.items()
    }
    home = lookup(table, _ends(model)[1])
    for name in table:
        # accelerate can separate tied weights, which would store them twice; and it puts rotary embeddings beside the last block,
        # so that the hidden states of every pass would go there and back. Modules inside a block stay with it.
        if home is not None and not _has_weights(model, name) and not any(p.isdigit() for p in name.split(".")):
            table[name] = home
    return {"": next(iter(table.values()))} if len(set(table.values())) == 1 else table


def _has_weights(model: nn.Module, name: str) -> bool:
    """Whether a module or tensor has weights of its own; a tied head has not."""
    return any(owner == name or owner.startswith(f"{name}.") for owner, _ in model.named_parameters())


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress accelerate's warnings about missing devices: those of `heretic preflight --devices` are virtual."""
    log = logging.getLogger("accelerate.utils.modeling")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def shares(
    model: PreTrainedModel,
    table: Mapping[str, int | str],
    blocks: int,
    fewer: Mapping[str, float] = MappingProxyType({}),
) -> dict[int | str, DeviceShare]:
    """Return the share of each device in the table; tied weights count once.

    Args:
        model: the meta model.
        table: devices by module name.
        blocks: number of decoder blocks.
        fewer: bytes per element of quantized parameters, by name.
    """
    by_device: dict[int | str, DeviceShare] = {}
    head, embedding = _ends(model)

    def share(name: str) -> DeviceShare:
        place = lookup(table, name)
        return by_device.setdefault(UNPLACED if place is None else place, DeviceShare())

    for name, parameter in model.named_parameters():
        share(name).weights += int(parameter.numel() * fewer.get(name, parameter.element_size()))
    for number, name in enumerate(block_names(model, blocks)):
        share(_first_tensor(model, name)).blocks.append(number)  # a split block counts on its first tensor's device
    share(embedding).embedding = True
    share(head).head = True
    return by_device


def _ends(model: PreTrainedModel) -> tuple[str, str]:
    """Return the names of output head and embedding, which are equal if the model has no head of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding = names.get(id(model.get_input_embeddings()), "")
    return names.get(id(model.get_output_embeddings()), embedding), embedding


def block_names(model: nn.Module, blocks: int) -> list[str]:
    """Return the names of the decoder blocks: the entries of the largest module list of length `blocks`."""
    from torch import nn

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    lists = [
        (size(module), f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == blocks
    ]
    if not lists:
        return []
    _, prefix, _ = max(lists, key=lambda entry: entry[0])
    return [f"{prefix}{i}" for i in range(blocks)]


def _first_tensor(model: nn.Module, name: str) -> str:
    """Return the name of a module's first parameter, or of the module if it has none."""
    return next((f"{name}.{tensor}" for tensor, _ in model.get_submodule(name).named_parameters()), name)


def lookup(table: Mapping[str, int | str], name: str) -> int | str | None:
    """Return the device of a tensor or module: the one of its longest prefix in the table; None if there is none."""
    while name not in table:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return table[name]
