"""How much memory a run takes on every device, and the largest batch that fits: arithmetic on shapes, nothing is loaded.

What is counted exactly: the weights, from the model built without memory in the chosen number format. What is an upper bound:
the keys and values (sliding windows and linear attention keep less), the captured residuals, the operators of one trial. What
is an estimate: the working memory of a forward pass, taken as `ACTIVATION_COPIES` tensors as wide as the widest layer. It
assumes an attention that does not store all scores (SDPA, flash attention); eager attention on long prompts takes more.
Fragmentation, the CUDA context and the libraries' workspaces are covered by the headroom only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from heretic.errors import UserError
from heretic.machine.placement import (
    CPU,
    MODES,
    NOWHERE,
    Device,
    Share,
    device_named,
    everything_on,
    explicit,
    shares,
    skeleton,
    spread,
    weight_limits,
)
from heretic.machine.shape import ModelShape
from heretic.model.checkpoint import Checkpoint
from heretic.model.quantisation import stored_bytes
from heretic.settings import Settings

MIB, GIB = 2**20, 2**30
FLOAT32 = 4
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}

LOGIT_COPIES = 3  # the logits, their log-softmax, and the difference to the original's
ACTIVATION_COPIES = 4  # gate, up, their product, and the residual stream with its norm
FLOAT32_SHARE = 0.7  # of the RAM that weights in float32 may take
LARGEST_BATCH = 512  # several trials may share a pass
LARGEST_ON_CPU = 128  # beyond it a pass takes as long a prompt as before
GOOD_BATCH = 8  # a device on which a smaller batch fits only is not preferred to several devices
ROWS_WITH_GRADIENTS = 1  # that there is room for at least
TIGHT = 0.95  # of the free memory
CHARACTERS_PER_TOKEN = 3  # fewer than in English, so that the plan is on the safe side
TEMPLATE_TOKENS = 40


@dataclass(frozen=True)
class DeviceLoad:
    """What one device has to hold, in bytes; `layers` says in words which part of the model it holds."""

    device: Device
    layers: str
    weights: int
    cache: int
    logits: int
    activations: int
    capture: int
    operators: int
    gradients: int
    copies: int
    headroom: int

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        run = self.cache + self.logits + self.activations + self.capture + self.operators + self.gradients
        return self.weights + run + self.copies + self.headroom

    @property
    def fits(self) -> bool:
        """Whether it is at most what the device has free."""
        return self.total <= self.device.free

    @property
    def tight(self) -> bool:
        """Whether it fits with less than 5 % to spare."""
        return self.fits and self.total > TIGHT * self.device.free


@dataclass(frozen=True)
class MemoryPlan:
    """Where the model goes and what that takes.

    `device_map` is the resolved table for loading, `max_memory` the room for weights (bytes by device) that accelerate was
    given, None where it was not asked. `batch_size` is the one asked for or chosen, `largest_batch_size` the one that would
    be chosen (0: not even one prompt fits). `offloaded` counts the bytes of weights for which there is no device.
    """

    device_map: dict[str, int | str]
    max_memory: dict[str, int] | None
    dtype: str
    batch_size: int
    largest_batch_size: int
    prompt_tokens: int
    new_tokens: int
    loads: tuple[DeviceLoad, ...]
    offloaded: int

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
        loads = [asdict(load) | {"total": load.total, "fits": load.fits} for load in self.loads]
        return asdict(self) | {"loads": loads, "fits": self.fits, "tight": self.tight, "weights": self.weights}


def planned_dtype(name: str, checkpoint: Checkpoint, on_cpu: bool, ram: int) -> str:
    """The number format that `name` stands for, as PyTorch spells it; `ram` is all of the RAM in bytes, free or not.

    All of it, because the choice must not change with what else runs: a study would begin anew.

    `auto` is the one most of the checkpoint's bytes are in. On a CPU it is float32 if the weights then take at most 70 % of the
    RAM, because CPUs without native support are about 3 times slower in bfloat16.
    """
    if name != "auto":
        return name
    if on_cpu and checkpoint.parameters * FLOAT32 <= FLOAT32_SHARE * ram:
        return "float32"
    stored: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in NAMES:
            stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.nbytes
    return NAMES[max(stored, key=lambda dtype: stored[dtype])] if stored else "bfloat16"


def plan_for(
    settings: Settings,
    checkpoint: Checkpoint,
    longest: int,
    devices: Sequence[Device],
    *,
    gradients: bool | None = None,
) -> MemoryPlan:
    """As `make_plan`, for settings; `longest` is the longest prompt in characters, `gradients` whether a walk is to be made."""
    return make_plan(
        checkpoint,
        device_map=settings.device_map,
        max_memory=settings.max_memory,
        dtypes=list(settings.dtypes),
        batch_size=settings.batch_size,
        prompt_tokens=prompt_tokens(settings, longest),
        new_tokens=settings.max_response_length,
        devices=devices,
        copies=settings.apply == "weights" and settings.cache_weights,
        gradients=settings.search.start != "kernels" if gradients is None else gradients,
        quantization=settings.quantization,
    )


def prompt_tokens(settings: Settings, longest: int) -> int:
    """Upper estimate of the tokens of a prompt of `longest` characters with system prompt, prefix and chat template."""
    characters = longest + len(settings.system_prompt) + len(settings.response_prefix)
    return characters // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS


def make_plan(
    checkpoint: Checkpoint,
    *,
    device_map: str | Mapping[str, int | str],
    max_memory: Mapping[str, str],
    dtypes: Sequence[str],
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    devices: Sequence[Device],
    copies: bool = False,
    gradients: bool = False,
    quantization: str = "none",
) -> MemoryPlan:
    """Place the model and count what a run takes.

    `dtypes` is the setting: the first is planned for. `batch_size` 0 chooses the largest power of two that fits with something
    to spare, at most 512 (on a CPU 128). Prompts have up to `prompt_tokens` tokens and answers `new_tokens`. With
    `copies` the edited weights are kept twice; with `gradients` there is room for one row of the walk, blocks computed
    twice, where trials would need less (what more it takes is decided from what is free then). `planned` never moves weights to
    RAM; accelerate's modes do so where `devices` has the CPU beside GPUs, but not with a `quantization`, whose weights stay where
    they are.

    Raises UserError for a device that is not there, a malformed size, an incomplete table, or a model that cannot be built.
    """
    if not devices:
        raise UserError("No device was found to run on.")
    devices = sorted(devices, key=lambda device: not device.is_gpu)
    limits = weight_limits(max_memory, devices)
    named = _named_devices(device_map, devices)
    if quantization != "none" and any(device.is_gpu for device in named):
        named = [device for device in named if device.is_gpu]
    ram = next((device for device in devices if not device.is_gpu), None)
    on_cpu = all(not device.is_gpu for device in named)
    dtype = planned_dtype(dtypes[0], checkpoint, on_cpu, ram.total if ram else 0)
    model = skeleton(checkpoint, dtype)
    fewer = stored_bytes(model, quantization)
    shape = ModelShape.of(checkpoint.text_config, model)
    job = _Job(shape, prompt_tokens, new_tokens, copies, gradients, _opened_at_once(model, fewer))
    largest = LARGEST_ON_CPU if on_cpu else LARGEST_BATCH

    room = {device.name: _room(device, limits) for device in devices}
    table: dict[str, int | str] | None = None
    asked_accelerate = False
    if not isinstance(device_map, str):
        table = explicit(model, device_map, devices)
    elif device_map not in MODES or on_cpu:
        table = everything_on(named[0])
    elif device_map == "planned":
        table = _one_device(model, job, named, limits, batch_size or GOOD_BATCH, fewer)
    if table is None:
        asked_accelerate = True
        mode = "balanced" if device_map == "planned" else str(device_map)
        table = spread(model, mode, {device.name: room[device.name] for device in named}, named, fewer)

    placed = shares(model, table, job.shape.blocks, fewer)
    nowhere = placed.pop(NOWHERE, Share()).weights
    fitting = 0 if nowhere else job.largest_batch(placed, devices, largest)
    chosen = batch_size or fitting or 1
    return MemoryPlan(
        device_map=table,
        max_memory=room if asked_accelerate else None,
        dtype=dtype,
        batch_size=chosen,
        largest_batch_size=fitting,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        loads=job.loads(placed, devices, chosen),
        offloaded=nowhere,
    )


@dataclass(frozen=True)
class _Job:
    """What is to be run: a model of this shape on prompts of this length."""

    shape: ModelShape
    prompt_tokens: int
    new_tokens: int
    copies: bool
    gradients: bool
    opened: int = 0  # bytes of the one quantised weight that exists in full while it is multiplied by

    def loads(self, placed: Mapping[int | str, Share], devices: Sequence[Device], batch: int) -> tuple[DeviceLoad, ...]:
        """The load of every device that holds a part of the model."""
        used = [device for device in devices if device.key in placed]
        runs = {device.key: placed[device.key] for device in used}
        borrowed = 0
        if CPU in runs and used[0].is_gpu:  # what waits in RAM runs on the first GPU, one block at a time
            first, waiting = used[0].key, placed[CPU]
            runs[first] = Share(0, runs[first].blocks + waiting.blocks, head=runs[first].head or waiting.head)
            runs[CPU] = Share()
            borrowed = waiting.weights // max(1, len(waiting.blocks))
        return tuple(
            self._load(device, placed[device.key], runs[device.key], batch, borrowed if device is used[0] else 0)
            for device in used
        )

    def largest_batch(self, placed: Mapping[int | str, Share], devices: Sequence[Device], largest: int) -> int:
        """The largest power of two that fits with something to spare, else the largest that just fits, else 0."""
        sizes = [2**n for n in reversed(range(largest.bit_length()))]
        loads = {size: self.loads(placed, devices, size) for size in sizes}
        fitting = [size for size in sizes if all(load.fits for load in loads[size])]
        roomy = [size for size in fitting if not any(load.tight for load in loads[size])]
        return next(iter(roomy or fitting), 0)

    def _load(self, device: Device, holds: Share, runs: Share, batch: int, borrowed: int) -> DeviceLoad:
        shape, blocks = self.shape, len(runs.blocks)
        tokens = self.prompt_tokens + self.new_tokens
        working = ACTIVATION_COPIES * shape.widest * shape.element * batch * self.prompt_tokens
        cache = blocks * shape.cache_per_token * shape.element * batch * tokens
        logits = LOGIT_COPIES * shape.vocabulary * FLOAT32 * batch if runs.head else 0
        walk = shape.gradient_bytes(ROWS_WITH_GRADIENTS, self.prompt_tokens, blocks) if self.gradients and blocks else 0
        return DeviceLoad(
            device=device,
            layers=_describe(holds),
            weights=holds.weights,
            cache=cache,
            logits=logits,
            activations=(working + self.opened if blocks else 0) + borrowed,
            capture=blocks * shape.hidden * FLOAT32 * batch,
            # `norm_preserving` keeps, for the two writers of a block, one vector for the direction of every layer.
            operators=2 * blocks * shape.blocks * shape.hidden * FLOAT32,
            gradients=max(0, walk - cache - logits - working),
            copies=len(holds.blocks) * shape.edited * shape.element if self.copies else 0,
            headroom=_headroom(device, holds.weights),
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
    model: Any, job: _Job, gpus: Sequence[Device], limits: Mapping[str, int], batch: int, fewer: Mapping[str, float]
) -> dict[str, int | str] | None:
    """The table for the emptiest GPU, if everything fits there or there is no other."""
    best = max(gpus, key=lambda gpu: gpu.free)
    table = everything_on(best)
    placed = shares(model, table, job.shape.blocks, fewer)
    allowed = placed[best.key].weights <= limits.get(best.name, best.free)
    fits = allowed and all(load.fits for load in job.loads(placed, [best], batch))
    return table if fits or (len(gpus) == 1 and not limits) else None


def _opened_at_once(model: Any, fewer: Mapping[str, float]) -> int:
    """Bytes of the largest weight that is stored in fewer, in the model's number format."""
    return max((model.get_parameter(name).numel() * model.dtype.itemsize for name in fewer), default=0)


def _room(device: Device, limits: Mapping[str, int]) -> int:
    """Bytes that weights may take on a device: what is free without the headroom, and no more than `max_memory` says."""
    free = device.free - _headroom(device, 0) if device.is_gpu else int((device.free - 512 * MIB) / 1.05)
    return max(0, min(free, limits.get(device.name, free)))


def _headroom(device: Device, weights: int) -> int:
    """For fragmentation and the CUDA context on a GPU, for everything else that runs on the CPU."""
    return max(GIB, device.total * 8 // 100) if device.is_gpu else 512 * MIB + weights // 20


def _describe(share: Share) -> str:
    parts = ["embedding"] if share.embedding else []
    if share.blocks:
        parts.append(f"blocks {_ranges(share.blocks)}")
    return ", ".join(parts + (["head"] if share.head else [])) or "other modules"


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as '0-2, 5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)
