"""Which module of a model goes to which device, decided on a model without memory (PyTorch's meta device).

`planned` and accelerate's modes are resolved to a plain table from module names to devices. That table is what loading gets,
so the plan that was shown is the placement that happens.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from heretic.errors import UserError, first_line, plain_line
from heretic.hardware.devices import Device
from heretic.model.checkpoint import Checkpoint
from heretic.model.config_reading import auto_class

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

UNPLACED = "disk"  # accelerate's name for what fits on no device
MODES = ("planned", "auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class DeviceShare:
    """What one device gets: bytes of parameters, numbers of decoder blocks, and whether the ends of the model are there."""

    weights: int = 0
    blocks: list[int] = field(default_factory=list)
    embedding: bool = False
    head: bool = False


def meta_model(checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    """The model with all its modules and shapes but no memory. Raises UserError if transformers cannot build it."""
    import torch
    from accelerate import init_empty_weights

    config = copy.deepcopy(checkpoint.config)
    trusted = checkpoint.own_code
    auto = auto_class(config, trusted)
    file = str(checkpoint.folder / "config.json")
    try:
        # Buffers too are made without memory: a mask may be as large as the square of the context.
        with torch.device("meta"), init_empty_weights(include_buffers=True):
            model: PreTrainedModel = auto.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trusted)
    except Exception as error:  # any model's code runs here, so anything may come out of it
        raise UserError(
            f"transformers cannot build {checkpoint.model} from its config: {plain_line(first_line(error))[:250]}",
            code="model-not-buildable",
            where=file,
            fix="take config.json from the repository that the weights are from, or choose a model that transformers supports",
        ) from error
    _check_shapes(model, checkpoint, file)
    return model


def _check_shapes(model: PreTrainedModel, checkpoint: Checkpoint, file: str) -> None:
    """Compare the shapes that the config gives with those of the tensors of the same names. Raises UserError.

    Some families store experts with the last two axes the other way round.
    """
    for name, parameter in model.state_dict().items():
        held = checkpoint.tensors.get(name)
        if held is None or held.is_packed or checkpoint.gguf_file or checkpoint.quantized_by:
            continue
        if sorted(held.shape) != sorted(parameter.shape):
            raise UserError(
                f"{plain_line(name)[:100]} is {list(held.shape)} in {held.file.name if held.file else 'the weights'}, "
                f"and {list(parameter.shape)} by config.json.",
                code="config-size-mismatch",
                where=file,
                fix="take config.json from the repository that the weights are from",
            )


def device_named(value: int | str, devices: Sequence[Device], setting: str) -> Device:
    """The device that a setting names (`0`, `cuda`, `cuda:0`, `cpu`); UserError says what is there."""
    name = str(value).strip().lower()
    name = f"cuda:{name}" if name.isdigit() else "cuda:0" if name == "cuda" else name
    for device in devices:
        if device.name == name:
            return device
    there = ", ".join(device.name for device in devices)
    raise UserError(
        f"The setting '{setting}' names the device {value!r}, which does not exist.",
        code="device-not-there",
        where=setting,
        fix=f"one of: {there}",
    )


def weight_limits(max_memory: Mapping[str, str], devices: Sequence[Device]) -> dict[str, int]:
    """The setting `max_memory` in bytes by device name; devices that it does not name are not limited."""
    from accelerate.utils import convert_file_size_to_int

    limits = {}
    for name, size in max_memory.items():
        try:
            limits[device_named(name, devices, "max_memory").name] = convert_file_size_to_int(size)
        except ValueError:
            raise UserError(
                f"The setting 'max_memory' gives {name} the invalid size {size!r}.",
                code="invalid-size",
                where=f"max_memory.{name}",
                fix='write it like "20GiB"',
            ) from None
    return limits


def everything_on(device: Device) -> dict[str, int | str]:
    """The table that puts the whole model on one device."""
    return {"": device.key}


def infer_device_map(
    model: PreTrainedModel,
    mode: str,
    room: Mapping[str, int],
    devices: Sequence[Device],
    fewer: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, int | str]:
    """Accelerate's placement (`auto`, `balanced`, `balanced_low_0`, `sequential`) into `room` bytes per device.

    `fewer` are bytes an element of parameters that are stored quantized, by name. Modules for which there is no room are put on
    "disk".
    """
    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, get_balanced_memory

    unsplit = list(getattr(model, "_no_split_modules", None) or [])
    limits: dict[int | str, int] = {device.key: room[device.name] for device in devices if device.name in room}
    # Accelerate knows whole kinds of numbers only: what takes 4.1 bits counts there as 4, which the reserve bears.
    kinds: Any = {name: CustomDtype.INT4 if size < 0.75 else torch.int8 for name, size in fewer.items()}
    with _not_said():
        if mode != "sequential":
            limits = get_balanced_memory(
                model,
                max_memory=limits,
                no_split_module_classes=unsplit,
                special_dtypes=kinds,
                low_zero=mode == "balanced_low_0",
            )
        table = dict(
            infer_auto_device_map(model, max_memory=limits, no_split_module_classes=unsplit, special_dtypes=kinds)
        )
    head, embedding = _ends(model)
    if head != embedding and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        table[head] = lookup(table, embedding)  # accelerate may part tied weights, which would store them twice
    return {"": next(iter(table.values()))} if len(set(table.values())) == 1 else table


@contextmanager
def _not_said() -> Iterator[None]:
    """Keep accelerate from warning that devices are not here: those of `heretic preflight --devices` need not be."""
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
    """What each device of the table holds; tied weights count once. `blocks` is the number of decoder blocks, `fewer` as above."""
    found: dict[int | str, DeviceShare] = {}
    head, embedding = _ends(model)

    def share(name: str) -> DeviceShare:
        place = lookup(table, name)
        return found.setdefault(UNPLACED if place is None else place, DeviceShare())

    for name, parameter in model.named_parameters():
        share(name).weights += int(parameter.numel() * fewer.get(name, parameter.element_size()))
    for number, name in enumerate(
        block_names(model, blocks)
    ):  # a block that was split counts where its first tensor is
        share(_first_tensor(model, name)).blocks.append(number)
    share(embedding).embedding = True
    share(head).head = True
    return found


def _ends(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the output head and of the embedding; the same where the model has no head of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding = names.get(id(model.get_input_embeddings()), "")
    return names.get(id(model.get_output_embeddings()), embedding), embedding


def block_names(model: nn.Module, blocks: int) -> list[str]:
    """Names of the decoder blocks: those of the largest list of modules that has the right length."""
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
    _, prefix, _ = max(lists, key=lambda found: found[0])
    return [f"{prefix}{i}" for i in range(blocks)]


def _first_tensor(model: nn.Module, name: str) -> str:
    """The name of a module's first tensor; that of the module where it has none."""
    return next((f"{name}.{tensor}" for tensor, _ in model.get_submodule(name).named_parameters()), name)


def lookup(table: Mapping[str, int | str], name: str) -> int | str | None:
    """The place of a tensor or module: that of the longest name in the table that leads to it."""
    while name not in table:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return table[name]
