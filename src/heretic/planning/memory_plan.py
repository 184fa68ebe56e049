"""Plan the placement of a model and the batch size without loading anything.

The meta model gives the size of the weights, `planning.memory_model` the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from heretic.errors import UserError
from heretic.hardware.devices import Device
from heretic.model.checkpoint import Checkpoint
from heretic.model.meta_model import meta_model
from heretic.model.quantization import BITSANDBYTES, kept_bytes, stored_bytes
from heretic.model.tensor_info import DEQUANTIZED, SCALES
from heretic.planning.device_table import explicit
from heretic.planning.memory_model import CONTEXT, MIB, DeviceMemory, MemoryModel, headroom
from heretic.planning.model_dims import ModelDims
from heretic.planning.partition import WEIGHS, partitions
from heretic.planning.pass_memory import FLOAT32
from heretic.planning.placement import (
    MODES,
    UNPLACED,
    DeviceShare,
    device_named,
    everything_on,
    infer_device_map,
    shares,
    weight_limits,
)
from heretic.planning.workload import Workload
from heretic.settings import Settings

NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}

FLOAT32_SHARE = 0.7  # of the RAM, for weights in float32
LARGEST_BATCH = 512  # several trials can share a pass
LARGEST_ON_CPU = 128  # larger batches are not faster per prompt
FAR_LARGER = 2  # an uneven table must give a batch this many times larger to be preferred to the most even one
GOOD_BATCH = 8  # one device must fit this batch to be preferred to several devices


@dataclass(frozen=True)
class MemoryPlan:
    """The placement of a model and its memory on every device."""

    device_map: dict[str, int | str]  # resolved, for loading
    max_memory: dict[str, int] | None  # bytes for weights by device if modules are spread; else None
    dtype: str
    batch_size: int  # of the settings, or chosen
    largest_batch_size: int  # that fits; 0: not even one prompt
    prompt_tokens: int
    new_tokens: int
    trials_per_batch: int  # maximum
    loads: tuple[DeviceMemory, ...]
    offloaded: int  # bytes of weights that fit on no device
    residuals: int = 0  # bytes of all prompts' residuals in RAM

    @property
    def fits(self) -> bool:
        """Whether all weights have a device and every device has enough memory for the run."""
        return self.offloaded == 0 and all(load.fits for load in self.loads)

    @property
    def tight(self) -> bool:
        """Whether the plan fits, but a device has less than 5 % to spare."""
        return self.fits and any(load.tight for load in self.loads)

    @property
    def weights(self) -> int:
        """Bytes of all weights, placed or not."""
        return sum(load.weights for load in self.loads) + self.offloaded

    @property
    def on_gpu(self) -> bool:
        """Whether weights are on a GPU."""
        return any(load.device.is_gpu for load in self.loads)

    @property
    def in_ram(self) -> int:
        """Bytes of weights in RAM that every pass moves to a GPU, which is slow; 0 for a run on the CPU."""
        return sum(load.weights for load in self.loads if not load.device.is_gpu) if self.on_gpu else 0

    def from_pretrained_arguments(self) -> dict[str, Any]:
        """Return arguments for `AutoModelForCausalLM.from_pretrained`; accelerate places the model if weights do not fit."""
        return {"device_map": "auto"} if self.offloaded else {"device_map": dict(self.device_map)}

    def as_dict(self) -> dict[str, Any]:
        """Return the plan and its totals as plain data."""
        loads = [asdict(load) | {"peak": load.peak, "total": load.total, "fits": load.fits} for load in self.loads]
        return asdict(self) | {"loads": loads, "fits": self.fits, "tight": self.tight, "weights": self.weights}


def planned_dtype(wanted: str, checkpoint: Checkpoint, cpu: Device | None) -> str:
    """Resolve a number format; `auto` is the checkpoint's, or on a CPU float32 where that is faster and fits.

    A CPU with native bfloat16 multiplies matrices in it 2 to 3 times faster than in float32; others are about 3 times slower in
    it. float32 fits if its weights take at most 70 % of the RAM.

    Args:
        wanted: the format of the settings.
        checkpoint: the checkpoint.
        cpu: the CPU if the model runs on it, else None. Its total RAM counts, not the free RAM, so that other programs do not
            change the fingerprint.
    """
    if wanted != "auto":
        return wanted
    stored = stored_dtype(checkpoint)
    if cpu is None or checkpoint.quantized_by == BITSANDBYTES or (cpu.native_bfloat16 and stored == "bfloat16"):
        return stored or "bfloat16"
    return "float32" if checkpoint.parameters * FLOAT32 <= FLOAT32_SHARE * cpu.total else stored or "bfloat16"


def stored_dtype(checkpoint: Checkpoint) -> str | None:
    """Return the number format of most of the checkpoint's bytes; None if all are quantized."""
    stored: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in NAMES and not (checkpoint.quantized_by and name.endswith(SCALES)):
            stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.nbytes
    return NAMES[max(stored, key=lambda dtype: stored[dtype])] if stored else None


def plan_for(settings: Settings, checkpoint: Checkpoint, work: Workload, devices: Sequence[Device]) -> MemoryPlan:
    """Make a plan from settings, as `make_plan`."""
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
    """Place the model and compute the memory of a run.

    `planned` never offloads weights to RAM. Accelerate's modes do if `devices` has the CPU beside GPUs, without quantization.

    Args:
        checkpoint: the model.
        work: the workload.
        device_map, max_memory, quantization: as the settings.
        dtypes: as the setting; the plan uses the first.
        batch_size: 0 chooses the largest that fits with memory to spare, at most 512 (on a CPU 128); see `largest_batch`.
        devices: the available devices.
        copies: whether a copy of the edited weights is kept.

    Raises:
        UserError: for an unknown device, an invalid size, an incomplete table, or a model that cannot be built.
    """
    # 1. Choose devices and number format
    devices = sorted(devices, key=lambda device: not device.is_gpu)
    named = _allowed_devices(device_map, devices, quantization)
    limits = weight_limits(max_memory, devices)
    on_cpu = all(not device.is_gpu for device in named)
    dtype = planned_dtype(dtypes[0], checkpoint, next(iter(named), None) if on_cpu else None)
    # 2. Build the memory model
    model = meta_model(checkpoint, dtype)
    bytes_per_element = kept_bytes(model, checkpoint) or stored_bytes(model, quantization)
    demand = _memory_model(model, checkpoint, work, bytes_per_element, copies=copies)
    # 3. Place the modules
    table, room = _place(model, demand, device_map, devices, named, limits, batch_size, bytes_per_element)
    # 4. Choose the batch size
    shape, largest = demand.shape, LARGEST_ON_CPU if on_cpu else LARGEST_BATCH
    placed = shares(model, table, shape.blocks, bytes_per_element)
    unplaced = placed.pop(UNPLACED, DeviceShare()).weights
    fitting = 0 if unplaced else demand.largest_batch(placed, devices, largest)
    chosen = batch_size or fitting or 1
    return MemoryPlan(
        device_map=table,
        max_memory=room,
        dtype=dtype,
        batch_size=chosen,
        largest_batch_size=fitting,
        prompt_tokens=work.prompt_tokens,
        new_tokens=work.new_tokens,
        trials_per_batch=work.trials_per_batch(chosen),
        loads=demand.device_memory(placed, devices, chosen),
        offloaded=unplaced,
        residuals=work.every * shape.blocks * shape.hidden * FLOAT32,
    )


def _allowed_devices(
    device_map: str | Mapping[str, int | str], devices: Sequence[Device], quantization: str
) -> list[Device]:
    """Return the devices that the settings allow for weights, in the order of `devices`; quantized weights prefer GPUs.

    Raises UserError without any device or for an unknown one.
    """
    if not devices:
        raise UserError("No device is available.", code="no-device", where="device_map", fix='device_map = "cpu"')
    named = _named_devices(device_map, devices)
    gpus = [device for device in named if device.is_gpu]
    return gpus if gpus and quantization != "none" else named


def _named_devices(device_map: str | Mapping[str, int | str], devices: Sequence[Device]) -> list[Device]:
    """Return the devices that `device_map` allows for weights, in the order of `devices`."""
    if not isinstance(device_map, str):
        used = [device_named(value, devices, "device_map") for value in device_map.values()]
        return [device for device in devices if device in used]
    if device_map not in MODES:
        return [device_named(device_map, devices, "device_map")]
    gpus = [device for device in devices if device.is_gpu]
    uses_ram = any(device.uses_ram for device in gpus)  # weights in RAM are then no relief
    return gpus if gpus and (device_map == "planned" or uses_ram) else list(devices)


def _memory_model(
    model: Any, checkpoint: Checkpoint, work: Workload, bytes_per_element: Mapping[str, float], *, copies: bool
) -> MemoryModel:
    """Build the memory model of a run; `bytes_per_element`: bytes per element of quantized parameters, by name."""
    shape = ModelDims.of(checkpoint.text_config, model)
    opening = _largest(model) if checkpoint.quantized_by in DEQUANTIZED else 0
    merged = _largest_merged(model, checkpoint)
    return MemoryModel(shape, work, copies, _largest_dequantized(model, bytes_per_element), opening, merged)


def _place(
    model: Any,
    demand: MemoryModel,
    device_map: str | Mapping[str, int | str],
    devices: Sequence[Device],
    named: Sequence[Device],
    limits: Mapping[str, int],
    batch: int,
    bytes_per_element: Mapping[str, float],
) -> tuple[dict[str, int | str], dict[str, int] | None]:
    """Place the modules by the user's table, on one device, or spread over several.

    Returns:
        The device by module, and the bytes for weights by device if there are several; else None.
    """
    if not isinstance(device_map, str):
        return explicit(model, device_map, devices, demand.shape.blocks), None
    if device_map not in MODES or all(not device.is_gpu for device in named):
        return everything_on(named[0]), None
    planned = device_map == "planned"
    if planned and (table := _one_device(model, demand, named, limits, batch or GOOD_BATCH, bytes_per_element)):
        return table, None
    room = {device.name: _room(device, limits, demand.minimum) for device in devices}
    within = {device.name: room[device.name] for device in named}
    table = _spread(model, demand, devices, within, named, batch, bytes_per_element) if planned else None
    return table or infer_device_map(
        model, "balanced" if planned else device_map, within, named, bytes_per_element
    ), room


def _spread(
    model: Any,
    demand: MemoryModel,
    devices: Sequence[Device],
    within: Mapping[str, int],
    named: Sequence[Device],
    batch: int,
    bytes_per_element: Mapping[str, float],
) -> dict[str, int | str] | None:
    """Return the most even table that holds `batch`, or without one (0) a batch not far below the largest; None if none fits."""
    found = []
    for table in partitions(model, demand.shape.blocks, within, named, bytes_per_element, WEIGHS):
        placed = shares(model, table, demand.shape.blocks, bytes_per_element)
        found.append((demand.largest_batch(placed, devices, LARGEST_BATCH), table))
    most = max((batch for batch, _ in found), default=0)
    enough = min(batch, most) if batch else most / FAR_LARGER
    return next((table for held, table in found if held >= enough), None)


def _one_device(
    model: Any,
    demand: MemoryModel,
    gpus: Sequence[Device],
    limits: Mapping[str, int],
    batch: int,
    bytes_per_element: Mapping[str, float],
) -> dict[str, int | str] | None:
    """Return the table for a GPU where everything fits, the one with the largest batch, or for the only one; else None."""
    found = []
    for gpu in gpus:
        table = everything_on(gpu)
        placed = shares(model, table, demand.shape.blocks, bytes_per_element)
        allowed = placed[gpu.key].weights <= limits.get(gpu.name, gpu.free)
        if allowed and all(load.fits for load in demand.device_memory(placed, [gpu], batch)):
            found.append((demand.largest_batch(placed, [gpu], LARGEST_BATCH), gpu.free, table))
    if found:
        return max(found, key=lambda one: one[:2])[2]
    return everything_on(gpus[0]) if len(gpus) == 1 and not limits else None


def _largest_dequantized(model: Any, bytes_per_element: Mapping[str, float]) -> int:
    """Return the bytes of the largest quantized weight in the model's number format."""
    return max((model.get_parameter(name).numel() * model.dtype.itemsize for name in bytes_per_element), default=0)


def _largest(model: Any) -> int:
    """Return the elements of the largest weight, without embedding and head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    excluded = {id(end.weight) for end in ends if end is not None}
    return max((p.numel() for p in model.parameters() if id(p) not in excluded), default=0)


def _largest_merged(model: Any, checkpoint: Checkpoint) -> int:
    """Return the bytes of the largest weight of all experts that loading makes of single experts' tensors; 0 without one."""
    experts = (p for name, p in model.named_parameters() if p.ndim == 3 and name not in checkpoint.tensors)
    return max((p.numel() * p.element_size() for p in experts), default=0)


def _room(device: Device, limits: Mapping[str, int], least: int) -> int:
    """Return the bytes for weights on a device: free memory minus the minimum of a run, limited by `max_memory`."""
    free = int((device.free - 512 * MIB) / 1.05)
    if device.is_gpu:
        free = device.free - CONTEXT - least - headroom(device, 0)
    return max(0, min(free, limits.get(device.name, free)))


@dataclass(frozen=True)
class LoadPlan:
    """How to load the model."""

    dtypes: Sequence[str]  # to try in order
    arguments: dict[str, Any]  # of from_pretrained
    batch_size: int
    quantization: str = "none"

    @classmethod
    def of(cls, settings: Settings, plan: MemoryPlan | None) -> LoadPlan:
        """Return the load plan of a memory plan, or of the settings if there is no memory plan (--force)."""
        if plan is None:
            device_map = "auto" if settings.device_map == "planned" else settings.device_map
            formats = ["bfloat16" if d == "auto" else d for d in settings.dtypes]
            return cls(formats, {"device_map": device_map}, settings.batch_size or 4, settings.quantization)
        dtypes = [plan.dtype, *(d for d in settings.dtypes[1:] if d != "auto")]
        return cls(dtypes, plan.from_pretrained_arguments(), plan.batch_size, settings.quantization)
