"""Plan a model that is read block by block: the device that it runs on, its number format and its batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from heretic.ablation.geometries import GEOMETRIES
from heretic.errors import UserError
from heretic.hardware.devices import Device
from heretic.hardware.host import format_bytes
from heretic.model.architecture import decoder_blocks
from heretic.model.batching import TOKENS_AT_ONCE
from heretic.model.checkpoint import Checkpoint
from heretic.model.meta_model import meta_model
from heretic.planning.memory_model import CONTEXT, PROGRAM, headroom
from heretic.planning.memory_plan import LARGEST_ON_CPU, planned_dtype
from heretic.planning.model_dims import ModelDims
from heretic.planning.pass_memory import PassMemory, Rows
from heretic.planning.placement import MODES, device_named
from heretic.planning.workload import Workload
from heretic.settings import AblationSettings, Settings


@dataclass(frozen=True)
class BlockPlan:
    """Where and how a model runs of which one block is in memory at a time."""

    device: Device
    dtype: str
    batch_size: int
    weights: int  # bytes that are in memory at a time: the largest block, and all that is outside the blocks
    mixture: bool  # has fused experts, which takes more reads to find


def plan_by_block(settings: Settings, checkpoint: Checkpoint, work: Workload, devices: Sequence[Device]) -> BlockPlan:
    """Choose the GPU with the most free memory if a block fits on it, else the CPU, and the largest batch that fits.

    Args:
        settings: `device_map` (a device, or a mode), `dtypes` and `batch_size` count.
        checkpoint: the model.
        work: the lengths of the prompts.
        devices: the available devices, the CPU last.

    Raises:
        UserError: for an unknown device, or if no device has enough memory for a block with one prompt.
    """
    for device in _allowed(settings, devices):
        dtype = planned_dtype(settings.dtypes[0], checkpoint, None if device.is_gpu else device)
        model = meta_model(checkpoint, dtype)
        weights, largest = _in_memory(model)
        # Fusing experts takes one tensor more.
        fixed = weights + largest + (CONTEXT if device.is_gpu else PROGRAM) + headroom(device, weights)
        shape = ModelDims.of(checkpoint.text_config, model)
        if not device.is_gpu:  # between blocks the hidden states of all prompts are in the same RAM
            fixed += 2 * work.training * work.prompt_tokens * shape.hidden * model.dtype.itemsize
        passes = PassMemory(shape, 1, embedding=True)
        rows = [2**n for n in reversed(range(LARGEST_ON_CPU.bit_length()))]
        needed = {count: fixed + _pass(passes, count, work.prompt_tokens) for count in rows}
        if fitting := next((count for count in rows if needed[count] <= device.free), 0):
            mixture = any(parameter.ndim == 3 for parameter in model.parameters())
            return BlockPlan(device, dtype, settings.batch_size or fitting, weights, mixture)
    raise UserError(
        f"One block with one prompt needs {format_bytes(needed[1])}. {device.name} has {format_bytes(device.free)} free.",
        code="block-too-large",
        where="memory",
        fix='end other programs, or dtypes = ["bfloat16"], or use a machine with more memory',
    )


def supported_by_block(edit: AblationSettings) -> dict[str, str | bool]:
    """Return the settings of an edit that need the whole model, each with a value that does not."""
    found: dict[str, str | bool] = {}
    if GEOMETRIES[edit.geometry].reads_inputs:
        found["ablation.geometry"] = "norm_preserving"
    if edit.readers:
        found["ablation.readers"] = False
    return found


def _in_memory(model: PreTrainedModel) -> tuple[int, int]:
    """Return the bytes of the largest block with all that is outside the blocks, and of the largest tensor of a block."""
    _, blocks = decoder_blocks(model)
    sizes = [[p.numel() * p.element_size() for p in block.parameters()] for block in blocks]
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    by_block = [sum(block) for block in sizes]
    return total - sum(by_block) + max(by_block), max(max(block) for block in sizes)


def _allowed(settings: Settings, devices: Sequence[Device]) -> list[Device]:
    """Return the devices to try, the GPU with the most free memory first."""
    wanted = settings.device_map
    if not isinstance(wanted, str):
        raise UserError(
            "Block by block, the whole model runs on one device.",
            code="not-by-block",
            where="device_map",
            fix='device_map = "planned", or the name of a device',
        )
    if wanted not in MODES:
        return [device_named(wanted, devices, "device_map")]
    gpus = sorted((device for device in devices if device.is_gpu), key=lambda device: -device.free)
    return [*gpus[:1], *(device for device in devices if not device.is_gpu)]


def _pass(passes: PassMemory, rows: int, tokens: int) -> int:
    """Return the bytes of a pass of prompts of this length through one block."""
    count = min(rows, max(1, TOKENS_AT_ONCE // tokens))
    return passes.forward(Rows(count, tokens), cached=False)
