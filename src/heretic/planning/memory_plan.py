"""Where a model goes and how large a batch may be, so that every device has room for the run; nothing is loaded.

The weights are counted from the model built without memory in the chosen number format, the rest by `machine.demand`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from heretic.errors import UserError
from heretic.hardware.devices import Device
from heretic.model.checkpoint import Checkpoint
from heretic.model.quantization import KEPT, kept_bytes, stored_bytes
from heretic.model.tensor_info import OPENED, SCALES
from heretic.planning.device_table import explicit
from heretic.planning.memory_model import CONTEXT, FLOAT32, MIB, DeviceMemory, MemoryModel, headroom
from heretic.planning.model_dims import ModelDims
from heretic.planning.placement import (
    MODES,
    UNPLACED,
    DeviceShare,
    device_named,
    everything_on,
    infer_device_map,
    meta_model,
    shares,
    weight_limits,
)
from heretic.planning.workload import Workload
from heretic.settings import Settings

NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}

FLOAT32_SHARE = 0.7  # of the RAM that weights in float32 may take
LARGEST_BATCH = 512  # several trials may share a pass
LARGEST_ON_CPU = 128  # beyond it a pass takes as long a prompt as before
GOOD_BATCH = 8  # a device on which a smaller batch fits only is not preferred to several devices


@dataclass(frozen=True)
class MemoryPlan:
    """Where the model goes and what that takes.

    `device_map` is the resolved table for loading, `max_memory` the room for weights (bytes by device) that accelerate was
    given, None where it was not asked. `batch_size` is the one asked for or chosen, `largest_batch_size` the one that would
    be chosen (0: not even one prompt fits), `trials_per_batch` the most trials that share a pass. `offloaded` counts the bytes of
    weights for which there is no device, `residuals` those of the residuals of every prompt that are kept in RAM for a while.
    """

    device_map: dict[str, int | str]
    max_memory: dict[str, int] | None
    dtype: str
    batch_size: int
    largest_batch_size: int
    prompt_tokens: int
    new_tokens: int
    trials_per_batch: int
    loads: tuple[DeviceMemory, ...]
    offloaded: int
    residuals: int = 0

    @property
    def fits(self) -> bool:
        """Whether all weights have a place and every device has room for the run."""
        return self.offloaded == 0 and all(load.fits for load in self.loads)

    @property
    def tight(self) -> bool:
        """Whether it fits, but some device has less than 5 % to spare."""
        return self.fits and any(load.tight for load in self.loads)

    @property
    def weights(self) -> int:
        """Bytes of all weights, placed or not."""
        return sum(load.weights for load in self.loads) + self.offloaded

    @property
    def on_gpu(self) -> bool:
        """Whether any GPU holds weights."""
        return any(load.device.is_gpu for load in self.loads)

    @property
    def in_ram(self) -> int:
        """Bytes of weights that wait in RAM for their turn on a GPU, which makes every pass slow; 0 for a run on the CPU."""
        return sum(load.weights for load in self.loads if not load.device.is_gpu) if self.on_gpu else 0

    def from_pretrained_arguments(self) -> dict[str, Any]:
        """Arguments for `AutoModelForCausalLM.from_pretrained` that place the model as planned.

        The table is complete, so no `max_memory` goes with it. Where weights are left over, placing is left to accelerate.
        """
        return {"device_map": "auto"} if self.offloaded else {"device_map": dict(self.device_map)}

    def as_dict(self) -> dict[str, Any]:
        """The plan and what follows from it as plain data."""
        loads = [asdict(load) | {"peak": load.peak, "total": load.total, "fits": load.fits} for load in self.loads]
        return asdict(self) | {"loads": loads, "fits": self.fits, "tight": self.tight, "weights": self.weights}


def planned_dtype(wanted: str, checkpoint: Checkpoint, on_cpu: bool, ram: int) -> str:
    """The number format that `wanted` stands for, as PyTorch spells it; `ram` is all of the RAM in bytes, free or not.

    All of it, because the choice must not change with what else runs: a study would begin anew.

    `auto` is the one most of the checkpoint's bytes are in. On a CPU it is float32 if the weights then take at most 70 % of the
    RAM, because CPUs without native support are about 3 times slower in bfloat16.
    """
    if wanted != "auto":
        return wanted
    keeps = checkpoint.quantized_by == KEPT  # with the numbers around the quantized ones as they were then
    if on_cpu and not keeps and checkpoint.parameters * FLOAT32 <= FLOAT32_SHARE * ram:
        return "float32"
    return stored_dtype(checkpoint) or "bfloat16"


def stored_dtype(checkpoint: Checkpoint) -> str | None:
    """The number format that most of the checkpoint's bytes are in; None if that is one that only holds quantized numbers."""
    stored: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in NAMES and not (checkpoint.quantized_by and name.endswith(SCALES)):
            stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.nbytes
    return NAMES[max(stored, key=lambda dtype: stored[dtype])] if stored else None


def plan_for(settings: Settings, checkpoint: Checkpoint, work: Workload, devices: Sequence[Device]) -> MemoryPlan:
    """As `make_plan`, for settings."""
    return make_plan(
        checkpoint,
        work,
        device_map=settings.device_map,
        max_memory=settings.max_memory,
        dtypes=list(settings.dtypes),
        batch_size=settings.batch_size,
        devices=devices,
        copies=settings.apply == "weights" and settings.cache_weights,
        quantization=settings.quantization,
    )


def make_plan(
    checkpoint: Checkpoint,
    work: Workload,
    *,
    device_map: str | Mapping[str, int | str],
    max_memory: Mapping[str, str],
    dtypes: Sequence[str],
    batch_size: int,
    devices: Sequence[Device],
    copies: bool = False,
    quantization: str = "none",
) -> MemoryPlan:
    """Place the model and count what a run takes.

    `dtypes` is the setting: the first is planned for. `batch_size` 0 chooses the largest power of two that fits with something
    to spare, at most 512 (on a CPU 128). With `copies` the edited weights are kept twice. `planned` never moves weights to RAM;
    accelerate's modes do so where `devices` has the CPU beside GPUs, but not with a `quantization`, whose weights stay where they
    are.

    Raises UserError for a device that is not there, a malformed size, an incomplete table, or a model that cannot be built.
    """
    if not devices:
        raise UserError(
            "No device was found to run on.", code="no-device", where="device_map", fix='device_map = "cpu"'
        )
    devices = sorted(devices, key=lambda device: not device.is_gpu)
    limits = weight_limits(max_memory, devices)
    named = _named_devices(device_map, devices)
    if quantization != "none" and any(device.is_gpu for device in named):
        named = [device for device in named if device.is_gpu]
    ram = next((device for device in devices if not device.is_gpu), None)
    on_cpu = all(not device.is_gpu for device in named)
    dtype = planned_dtype(dtypes[0], checkpoint, on_cpu, ram.total if ram else 0)
    model = meta_model(checkpoint, dtype)
    fewer = kept_bytes(model, checkpoint) or stored_bytes(model, quantization)
    shape = ModelDims.of(checkpoint.text_config, model)
    opening = _largest(model) if checkpoint.quantized_by in OPENED else 0
    demand = MemoryModel(shape, work, copies, _opened_at_once(model, fewer), opening)
    largest = LARGEST_ON_CPU if on_cpu else LARGEST_BATCH

    room = {device.name: _room(device, limits, demand.minimum) for device in devices}
    table: dict[str, int | str] | None = None
    asked_accelerate = False
    if not isinstance(device_map, str):
        table = explicit(model, device_map, devices, shape.blocks)
    elif device_map not in MODES or on_cpu:
        table = everything_on(named[0])
    elif device_map == "planned":
        table = _one_device(model, demand, named, limits, batch_size or GOOD_BATCH, fewer)
    if table is None:
        asked_accelerate = True
        mode = "balanced" if device_map == "planned" else str(device_map)
        table = infer_device_map(model, mode, {device.name: room[device.name] for device in named}, named, fewer)

    placed = shares(model, table, demand.shape.blocks, fewer)
    nowhere = placed.pop(UNPLACED, DeviceShare()).weights
    fitting = 0 if nowhere else demand.largest_batch(placed, devices, largest)
    chosen = batch_size or fitting or 1
    return MemoryPlan(
        device_map=table,
        max_memory=room if asked_accelerate else None,
        dtype=dtype,
        batch_size=chosen,
        largest_batch_size=fitting,
        prompt_tokens=work.prompt_tokens,
        new_tokens=work.new_tokens,
        trials_per_batch=work.trials_per_batch(chosen),
        loads=demand.device_memory(placed, devices, chosen),
        offloaded=nowhere,
        residuals=work.every * shape.blocks * shape.hidden * FLOAT32,
    )


def _named_devices(device_map: str | Mapping[str, int | str], devices: Sequence[Device]) -> list[Device]:
    """The devices that the setting allows for weights, in their order."""
    if not isinstance(device_map, str):
        used = [device_named(value, devices, "device_map") for value in device_map.values()]
        return [device for device in devices if device in used]
    if device_map not in MODES:
        return [device_named(device_map, devices, "device_map")]
    gpus = [device for device in devices if device.is_gpu]
    return gpus if gpus and device_map == "planned" else list(devices)


def _one_device(
    model: Any,
    demand: MemoryModel,
    gpus: Sequence[Device],
    limits: Mapping[str, int],
    batch: int,
    fewer: Mapping[str, float],
) -> dict[str, int | str] | None:
    """The table for the emptiest GPU, if everything fits there or there is no other."""
    best = max(gpus, key=lambda gpu: gpu.free)
    table = everything_on(best)
    placed = shares(model, table, demand.shape.blocks, fewer)
    allowed = placed[best.key].weights <= limits.get(best.name, best.free)
    fits = allowed and all(load.fits for load in demand.device_memory(placed, [best], batch))
    return table if fits or (len(gpus) == 1 and not limits) else None


def _opened_at_once(model: Any, fewer: Mapping[str, float]) -> int:
    """Bytes of the largest weight that is stored in fewer, in the model's number format."""
    return max((model.get_parameter(name).numel() * model.dtype.itemsize for name in fewer), default=0)


def _largest(model: Any) -> int:
    """Elements of the largest weight but the embedding's and the head's."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(end.weight) for end in ends if end is not None}
    return max((p.numel() for p in model.parameters() if id(p) not in kept), default=0)


def _room(device: Device, limits: Mapping[str, int], least: int) -> int:
    """Bytes that weights may take on a device: what is free without what any run needs, and no more than `max_memory` says."""
    free = int((device.free - 512 * MIB) / 1.05)
    if device.is_gpu:
        free = device.free - CONTEXT - least - headroom(device, 0)
    return max(0, min(free, limits.get(device.name, free)))


@dataclass(frozen=True)
class LoadPlan:
    """What the memory plan decided about loading: number formats to try, from_pretrained's arguments, prompts per batch; and the
    quantization of the settings."""

    dtypes: Sequence[str]
    arguments: dict[str, Any]
    batch_size: int
    quantization: str = "none"

    @classmethod
    def of(cls, settings: Settings, plan: MemoryPlan | None) -> LoadPlan:
        """How to load, from the memory plan; as the settings say where no plan could be made (--force)."""
        if plan is None:
            device_map = "auto" if settings.device_map == "planned" else settings.device_map
            formats = ["bfloat16" if d == "auto" else d for d in settings.dtypes]
            return cls(formats, {"device_map": device_map}, settings.batch_size or 4, settings.quantization)
        dtypes = [plan.dtype, *(d for d in settings.dtypes[1:] if d != "auto")]
        return cls(dtypes, plan.from_pretrained_arguments(), plan.batch_size, settings.quantization)
