"""Compute the memory of a run on every device, as the maximum over its phases: capture, weight statistics, gradient search, trials.

Exact: weights. Upper bounds: KV cache, captured residuals, operators, cached data of the original. Estimates: activations
(`ACTIVATION_COPIES` tensors of the widest layer) and tensors saved for gradients. Assumes SDPA or flash attention, and `CONTEXT`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heretic.ablation.geometries.conditional import BENIGN_KEYS, HARMFUL_KEYS
from heretic.ablation.weight_stats import ELEMENTS_PER_CHUNK
from heretic.hardware.devices import CPU, Device
from heretic.model.batching import TOKENS_AT_ONCE
from heretic.model.forward import LOGIT_ROWS
from heretic.planning.model_dims import SHARE_FOR_GRADIENTS, ModelDims
from heretic.planning.placement import DeviceShare
from heretic.planning.workload import Workload
from heretic.scoring.gradient_loss import TOKENS_PER_CHUNK

MIB, GIB = 2**20, 2**30
FLOAT32 = 4

# A CUDA context with the kernels of a run, and as much for other accelerators. An assumption, not a measurement. Reported are
# 0.29 GB for a first kernel (pytorch/pytorch pull request 86509), about 400 MB (issue 109888) and 426 MiB for PyTorch 2.10 on an
# RTX 6000 Ada (unslothai/unsloth-zoo pull request 1053).
CONTEXT = 512 * MIB
# RAM of Python and the libraries before loading, without file pages: 380 MB measured (dev/LOG.md).
PROGRAM = 384 * MIB

ACTIVATION_COPIES = 4  # gate, up, their product, and the residual stream with its norm
# While measuring the KL divergence: logits, log-softmax, the original's, its probabilities, the difference, the product.
LOGIT_COPIES = 6
TIGHT = 0.95  # of the free memory
SHARE_FOR_RESIDUALS = 0.5  # of the free RAM, for the residuals of all prompts
MOST_CAPTURED = GIB  # of RAM, for the keys of input maps that are computed together
# Limits of the activation cache for each of the two prompt sets: a share of the free RAM, and bytes.
SHARE_KEPT = 0.05
MOST_KEPT = 2 * GIB


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that a run needs on one device, in bytes."""

    device: Device
    layers: str  # description of the part of the model on it
    # In all phases
    weights: int = 0
    context: int = 0  # the accelerator's context, or the program itself
    kept: int = 0  # cached data of the original model
    copies: int = 0  # of edited weights
    # A trial
    cache: int = 0  # KV cache
    operators: int = 0
    rounds: int = 0  # operators of the directions from iterative rounds
    activations: int = 0
    logits: int = 0
    # Other phases
    capture: int = 0  # of residuals
    gradients: int = 0  # gradient search with its logits
    weight_stats: int = 0  # of one weight
    loading: int = 0  # dequantizing the largest weight
    headroom: int = 0  # for fragmentation; on the CPU for everything else

    @property
    def run(self) -> int:
        """Bytes of the largest phase, without the memory needed in all phases. Logits follow after the blocks."""
        trial = self.cache + self.operators + self.rounds + max(self.activations, self.logits)
        return max(
            trial, self.activations + self.capture + self.rounds, self.gradients, self.weight_stats, self.loading
        )

    @property
    def peak(self) -> int:
        """Expected peak in bytes."""
        return self.weights + self.context + self.kept + self.copies + self.run

    @property
    def total(self) -> int:
        """Peak with headroom in bytes."""
        return self.peak + self.headroom

    @property
    def fits(self) -> bool:
        """Whether the total fits in the device's free memory."""
        return self.total <= self.device.free

    @property
    def tight(self) -> bool:
        """Whether it fits with less than 5 % to spare."""
        return self.fits and self.total > TIGHT * self.device.free


@dataclass(frozen=True)
class MemoryModel:
    """The memory model of a run: a model's dimensions and a workload."""

    shape: ModelDims
    work: Workload
    weight_copies: bool = False
    dequantized: int = 0  # bytes of the largest quantized weight, dequantized for its multiplication
    dequantization: int = 0  # elements of the largest weight that is dequantized during loading

    def device_memory(
        self, placed: Mapping[int | str, DeviceShare], devices: Sequence[Device], batch: int
    ) -> tuple[DeviceMemory, ...]:
        """Return the memory of every device that has a part of the model.

        Args:
            placed: share of the model by device.
            devices: all devices.
            batch: prompts per forward pass.
        """
        used = [device for device in devices if device.key in placed]
        runs = {device.key: placed[device.key] for device in used}
        borrowed = 0
        if CPU in runs and used[0].is_gpu:  # offloaded blocks run on the first GPU, one at a time
            first, waiting = used[0].key, placed[CPU]
            runs[first] = DeviceShare(0, runs[first].blocks + waiting.blocks, head=runs[first].head or waiting.head)
            runs[CPU] = DeviceShare()
            borrowed = waiting.weights // max(1, len(waiting.blocks))
        # Like the gradient search after loading: by the fullest of the devices that run blocks.
        room = [d.free - placed[d.key].weights - _context(d) for d in used if runs[d.key].blocks]
        rows, twice = self._gradient_rows(max(0, min(room, default=0)), batch, on_cpu=not used[0].is_gpu)
        loads = []
        for device in used:
            extra = borrowed if device is used[0] else 0
            load = self._memory_without_gradients(device, placed[device.key], runs[device.key], batch, extra)
            gradients = self._gradients(runs[device.key], rows, extra, twice=twice)
            if not replace(load, gradients=gradients).fits:  # the gradient search uses one row when memory runs out
                gradients = self._gradients(runs[device.key], 1, extra, twice=True)
            loads.append(replace(load, gradients=gradients))
        return tuple(loads)

    @property
    def minimum(self) -> int:
        """Bytes that any device needs besides weights, with one row; the placement leaves them free."""
        return max(self._weight_stats() if self.work.needs_weight_stats else 0, self._working(1) + self.dequantized)

    def largest_batch(self, placed: Mapping[int | str, DeviceShare], devices: Sequence[Device], largest: int) -> int:
        """Return the largest power of two that fits with memory to spare, else the largest that fits, else 0."""
        sizes = [2**n for n in reversed(range(largest.bit_length()))]
        loads = {size: self.device_memory(placed, devices, size) for size in sizes}
        fitting = [size for size in sizes if all(load.fits for load in loads[size])]
        roomy = [size for size in fitting if not any(load.tight for load in loads[size])]
        return next(iter(roomy or fitting), 0)

    def _memory_without_gradients(
        self, device: Device, holds: DeviceShare, runs: DeviceShare, batch: int, borrowed: int
    ) -> DeviceMemory:
        shape, work, blocks = self.shape, self.work, len(runs.blocks)
        rows, trials = work.trial_rows(batch), work.trials_per_batch(batch)
        length = work.prompt_tokens + work.tried_tokens + work.new_tokens
        vectors = 2 * blocks * trials * shape.hidden * FLOAT32  # one of every writer's, for every trial
        rows_of_logits = max(LOGIT_COPIES * FLOAT32 * min(rows, LOGIT_ROWS), shape.element * rows)
        return DeviceMemory(
            device=device,
            layers=describe(holds),
            weights=holds.weights,
            context=_context(device),
            kept=0 if device.is_gpu else self._kept(max(0, device.free - holds.weights)),
            copies=len(holds.blocks) * shape.edited * shape.element if self.weight_copies else 0,
            cache=blocks * shape.cache_per_token * shape.element * rows * length,
            operators=vectors * (2 * work.directions + 1) + self._input_vectors(blocks, trials),  # u, w, n; a
            rounds=vectors * 2 * work.directions * work.rounds,
            activations=(self._working(work.most_rows(batch)) + self.dequantized if blocks else 0) + borrowed,
            logits=shape.vocabulary * rows_of_logits if runs.head else 0,
            capture=blocks * shape.hidden * FLOAT32 * min(batch, work.training),
            # the numbers, scaled and rounded
            loading=self.dequantization * (2 * FLOAT32 + shape.element) if holds.blocks else 0,
            weight_stats=self._weight_stats() if work.needs_weight_stats and blocks else 0,
            headroom=headroom(device, holds.weights),
        )

    def _working(self, rows: int) -> int:
        tokens = min(rows * (self.work.tail + self.work.tried_tokens), max(TOKENS_AT_ONCE, self.work.tail))
        # What reads a writer's inputs converts a part of them to float32 at a time.
        converted = FLOAT32 * min(tokens * self.shape.widest, ELEMENTS_PER_CHUNK) if self.work.needs_input_maps else 0
        return ACTIVATION_COPIES * self.shape.widest * self.shape.element * tokens + converted

    def _weight_stats(self) -> int:
        """Return the bytes of rows of a weight in float32 and their squares."""
        copies = 1 if self.shape.element == FLOAT32 else 2
        return copies * min(ELEMENTS_PER_CHUNK, self.shape.hidden * self.shape.widest) * FLOAT32 + self.dequantized

    def _kept(self, free: int) -> int:
        """Return the bytes in RAM of the original's log-probabilities, the activation cache and the weight statistics."""
        shape, work = self.shape, self.work
        gradient_path = work.gradient_search
        places = work.harmless * work.kl_tokens + (
            gradient_path.prompts * gradient_path.kl_tokens if gradient_path else 0
        )
        most = min(MOST_KEPT, int(SHARE_KEPT * free))
        hidden, cache = (shape.blocks * shape.element * size for size in (shape.hidden, shape.cache_per_token))
        entries = min(most, work.tokens_kept(0) * (hidden + cache)) + min(most, work.tokens_kept(1) * hidden)
        facts = (
            2 * shape.blocks * shape.blocks * work.directions * (1 + work.rounds) * shape.hidden * FLOAT32
            if work.needs_weight_stats
            else 0
        )
        return places * shape.vocabulary * FLOAT32 + entries + facts + self._input_maps()

    def _input_maps(self) -> int:
        """Return the bytes in RAM of all writers' input maps, and of the keys while they are computed."""
        if not self.work.needs_input_maps:
            return 0
        numbers = FLOAT32 * self.shape.blocks * (self._inputs + 2 * self.shape.hidden)
        return HARMFUL_KEYS * numbers + min(MOST_CAPTURED, (HARMFUL_KEYS + BENIGN_KEYS) * numbers)

    @property
    def _inputs(self) -> int:
        """Inputs of an attention output projection and of an MLP down projection, together."""
        return self.shape.repeated_cache // 2 + self.shape.widest

    def _input_vectors(self, blocks: int, trials: int) -> int:
        """Return the bytes of the vectors of operators that read the writers' inputs."""
        return FLOAT32 * blocks * trials * self.work.directions * self._inputs if self.work.needs_input_maps else 0

    def _gradient_rows(self, free: int, batch: int, *, on_cpu: bool) -> tuple[int, bool]:
        """Return the rows of a pass with gradients, and whether it needs gradient checkpointing."""
        gradient_path = self.work.gradient_search
        if gradient_path is None:
            return 0, False
        more = max(gradient_path.refusal_tokens, gradient_path.kl_tokens) - 1
        rows, twice = self.shape.rows_with_gradients(
            int(SHARE_FOR_GRADIENTS * free), self.work.prompt_tokens + more, self.work.tail + more, on_cpu=on_cpu
        )
        return min(rows, batch, gradient_path.batch), twice

    def _gradients(self, runs: DeviceShare, rows: int, borrowed: int, *, twice: bool) -> int:
        gradient_path, shape, blocks = self.work.gradient_search, self.shape, len(runs.blocks)
        if gradient_path is None or not blocks:
            return 0
        more = max(gradient_path.refusal_tokens, gradient_path.kl_tokens) - 1
        # A pass computes the shared prefix once, except with gradient checkpointing.
        tokens, prefix = rows * (self.work.prompt_tokens + more), 0
        if not twice:
            tokens = rows * (self.work.tail + more) + self.work.shared_tokens
            prefix = shape.prefix_bytes(rows, self.work.shared_tokens, blocks)
        logits = (
            LOGIT_COPIES * min(TOKENS_PER_CHUNK, rows * (more + 1)) * shape.vocabulary * FLOAT32 if runs.head else 0
        )
        return shape.gradient_bytes(1, tokens, blocks, twice=twice) + prefix + logits + self.dequantized + borrowed


def headroom(device: Device, weights: int) -> int:
    """Return the bytes reserved for fragmentation on a GPU, or for everything else on the CPU."""
    return max(GIB, device.total * 8 // 100) - CONTEXT if device.is_gpu else 512 * MIB + weights // 20 - PROGRAM


def _context(device: Device) -> int:
    return CONTEXT if device.is_gpu else PROGRAM


def describe(share: DeviceShare) -> str:
    """Describe a share, for example 'embedding, blocks 0-11'."""
    parts = ["embedding"] if share.embedding else []
    if share.blocks:
        parts.append(f"blocks {_ranges(share.blocks)}")
    return ", ".join(parts + (["head"] if share.head else [])) or "other modules"


def _ranges(numbers: Sequence[int]) -> str:
    """Format [0, 1, 2, 5] as '0-2, 5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)
