"""What a run takes of every device, part by part: arithmetic on sizes.

The phases of a run follow each other, so what counts of them is the largest: residuals captured, weights studied, the walk,
trials. Counted exactly: the weights. Upper bounds: keys and values (sliding windows and linear attention keep less), captured
residuals, operators of all trials of a pass, what is kept of the original. Estimates: the working memory of a pass, taken as
`ACTIVATION_COPIES` tensors as wide as the widest layer, and what a block keeps for a gradient. An attention that does not store
all scores is assumed (SDPA, flash attention); eager attention on long prompts takes more. Assumed: `CONTEXT`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heretic.ablation.operator import ELEMENTS_PER_CHUNK
from heretic.hardware.devices import CPU, Device
from heretic.model.batching import TOKENS_AT_ONCE
from heretic.model.forward import LOGIT_ROWS
from heretic.planning.model_dims import SHARE_FOR_GRADIENTS, ModelDims
from heretic.planning.placement import DeviceShare
from heretic.planning.workload import Workload
from heretic.scoring.gradient_loss import TOKENS_PER_CHUNK

MIB, GIB = 2**20, 2**30
FLOAT32 = 4

# What a CUDA context takes of a GPU, with the kernels that a run loads into it. An assumption: none was measured here. Reported are
# 0.29 GB for a first kernel (pytorch/pytorch pull request 86509), about 400 MB (issue 109888) and 426 MiB for PyTorch 2.10 on an
# RTX 6000 Ada (unslothai/unsloth-zoo pull request 1053).
CONTEXT = 512 * MIB
# What Python and the libraries take of RAM before anything is loaded, pages of files aside: 380 MB measured (dev/LOG.md).
PROGRAM = 384 * MIB

ACTIVATION_COPIES = 4  # gate, up, their product, and the residual stream with its norm
# Of logits, while a divergence is measured: logits, log-softmax, the original's, its probabilities, the difference, the product.
LOGIT_COPIES = 6
TIGHT = 0.95  # of the free memory
SHARE_FOR_RESIDUALS = 0.5  # of the free RAM, that the residuals of every prompt may take
# Of the free RAM, that what is kept of the original's passes of each of the two prompt sets may take; and at most `MOST_KEPT`.
SHARE_KEPT = 0.05
MOST_KEPT = 2 * GIB


@dataclass(frozen=True)
class DeviceMemory:
    """What one device has to hold, in bytes; `layers` says in words which part of the model it holds.

    At all times: `weights`, the CUDA `context` or the program itself, what is `kept` of the original, `copies` of edited weights.
    A trial's are `cache` (keys and values), `operators`, what iterative `rounds` add, `activations` and `logits`. `capture`
    is that of residuals, `gradients` the walk's with its logits, `studying` what looking at one weight takes, `loading`
    what opening the largest quantized one takes. `headroom` is for fragmentation, on the CPU for all else.
    """

    device: Device
    layers: str
    weights: int = 0
    context: int = 0
    kept: int = 0
    copies: int = 0
    cache: int = 0
    operators: int = 0
    rounds: int = 0
    activations: int = 0
    logits: int = 0
    capture: int = 0
    gradients: int = 0
    weight_stats: int = 0
    loading: int = 0
    headroom: int = 0

    @property
    def run(self) -> int:
        """The most that any phase takes beside what stays, in bytes. The logits follow when the blocks are done."""
        trial = self.cache + self.operators + self.rounds + max(self.activations, self.logits)
        return max(
            trial, self.activations + self.capture + self.rounds, self.gradients, self.weight_stats, self.loading
        )

    @property
    def peak(self) -> int:
        """All that is expected to be in use at the fullest moment, in bytes."""
        return self.weights + self.context + self.kept + self.copies + self.run

    @property
    def total(self) -> int:
        """The same with the headroom."""
        return self.peak + self.headroom

    @property
    def fits(self) -> bool:
        """Whether it is at most what the device has free."""
        return self.total <= self.device.free

    @property
    def tight(self) -> bool:
        """Whether it fits with less than 5 % to spare."""
        return self.fits and self.total > TIGHT * self.device.free


@dataclass(frozen=True)
class MemoryModel:
    """What is to be run: a model of this shape on this work. `opened`: bytes of the one quantized weight that exists in full while
    it is multiplied by; `opening`: elements of the largest weight that is dequantized while it is loaded."""

    shape: ModelDims
    work: Workload
    weight_copies: bool = False
    dequantized: int = 0
    dequantization: int = 0

    def device_memory(
        self, placed: Mapping[int | str, DeviceShare], devices: Sequence[Device], batch: int
    ) -> tuple[DeviceMemory, ...]:
        """The load of every device that holds a part of the model."""
        used = [device for device in devices if device.key in placed]
        runs = {device.key: placed[device.key] for device in used}
        borrowed = 0
        if CPU in runs and used[0].is_gpu:  # what waits in RAM runs on the first GPU, one block at a time
            first, waiting = used[0].key, placed[CPU]
            runs[first] = DeviceShare(0, runs[first].blocks + waiting.blocks, head=runs[first].head or waiting.head)
            runs[CPU] = DeviceShare()
            borrowed = waiting.weights // max(1, len(waiting.blocks))
        # As `strengths` decides it when the weights are there: by the fullest of the devices that run blocks.
        room = [d.free - placed[d.key].weights - _context(d) for d in used if runs[d.key].blocks]
        rows, twice = self._walk_rows(max(0, min(room, default=0)), batch, on_cpu=not used[0].is_gpu)
        found = []
        for device in used:
            more = borrowed if device is used[0] else 0
            load = self._load(device, placed[device.key], runs[device.key], batch, more)
            gradients = self._gradients(runs[device.key], rows, more, twice=twice)
            if not replace(load, gradients=gradients).fits:  # it makes do with less where memory runs out
                gradients = self._gradients(runs[device.key], 1, more, twice=True)
            found.append(replace(load, gradients=gradients))
        return tuple(found)

    @property
    def minimum(self) -> int:
        """Bytes that a device needs for the run whatever part of the model it holds, with one row: placing leaves them free."""
        return max(self._studying() if self.work.needs_weight_stats else 0, self._working(1) + self.dequantized)

    def largest_batch(self, placed: Mapping[int | str, DeviceShare], devices: Sequence[Device], largest: int) -> int:
        """The largest power of two that fits with something to spare, else the largest that just fits, else 0."""
        sizes = [2**n for n in reversed(range(largest.bit_length()))]
        loads = {size: self.device_memory(placed, devices, size) for size in sizes}
        fitting = [size for size in sizes if all(load.fits for load in loads[size])]
        roomy = [size for size in fitting if not any(load.tight for load in loads[size])]
        return next(iter(roomy or fitting), 0)

    def _load(self, device: Device, holds: DeviceShare, runs: DeviceShare, batch: int, borrowed: int) -> DeviceMemory:
        """All but the walk."""
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
            operators=vectors * (2 * work.directions + 1),  # u and w for every direction, and n
            rounds=vectors * 2 * work.directions * work.rounds,
            activations=(self._working(work.most_rows(batch)) + self.dequantized if blocks else 0) + borrowed,
            logits=shape.vocabulary * rows_of_logits if runs.head else 0,
            capture=blocks * shape.hidden * FLOAT32 * min(batch, work.training),
            loading=self.dequantization * (2 * FLOAT32 + shape.element)
            if holds.blocks
            else 0,  # the numbers, scaled, and rounded
            weight_stats=self._studying() if work.needs_weight_stats and blocks else 0,
            headroom=headroom(device, holds.weights),
        )

    def _working(self, rows: int) -> int:
        tokens = min(rows * (self.work.tail + self.work.tried_tokens), max(TOKENS_AT_ONCE, self.work.tail))
        return ACTIVATION_COPIES * self.shape.widest * self.shape.element * tokens

    def _studying(self) -> int:
        """Rows of a weight in float32, and their squares."""
        copies = 1 if self.shape.element == FLOAT32 else 2
        return copies * min(ELEMENTS_PER_CHUNK, self.shape.hidden * self.shape.widest) * FLOAT32 + self.dequantized

    def _kept(self, free: int) -> int:
        """In RAM: log-probabilities of the original, what its blocks receive and their keys and values, facts of the weights."""
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
        return places * shape.vocabulary * FLOAT32 + entries + facts

    def _walk_rows(self, free: int, batch: int, *, on_cpu: bool) -> tuple[int, bool]:
        """Rows of a pass with gradients, and whether blocks are computed twice for it."""
        gradient_path = self.work.gradient_search
        if gradient_path is None:
            return 0, False
        length = self.work.prompt_tokens + max(gradient_path.refusal_tokens, gradient_path.kl_tokens) - 1
        rows, twice = self.shape.rows_with_gradients(int(SHARE_FOR_GRADIENTS * free), length, on_cpu=on_cpu)
        return min(rows, batch, gradient_path.batch), twice

    def _gradients(self, runs: DeviceShare, rows: int, borrowed: int, *, twice: bool) -> int:
        gradient_path, shape, blocks = self.work.gradient_search, self.shape, len(runs.blocks)
        if gradient_path is None or not blocks:
            return 0
        more = max(gradient_path.refusal_tokens, gradient_path.kl_tokens) - 1
        # What all prompts begin with is run once a pass, but for a pass whose blocks are computed twice.
        tokens, prefix = rows * (self.work.prompt_tokens + more), 0
        if not twice:
            tokens = rows * (self.work.tail + more) + self.work.shared_tokens
            prefix = shape.prefix_bytes(rows, self.work.shared_tokens, blocks)
        logits = (
            LOGIT_COPIES * min(TOKENS_PER_CHUNK, rows * (more + 1)) * shape.vocabulary * FLOAT32 if runs.head else 0
        )
        return shape.gradient_bytes(1, tokens, blocks, twice=twice) + prefix + logits + self.dequantized + borrowed


def headroom(device: Device, weights: int) -> int:
    """For fragmentation on a GPU, for everything else that runs on the CPU."""
    return max(GIB, device.total * 8 // 100) - CONTEXT if device.is_gpu else 512 * MIB + weights // 20 - PROGRAM


def _context(device: Device) -> int:
    return CONTEXT if device.is_gpu else PROGRAM


def describe(share: DeviceShare) -> str:
    """Which part of the model a share is, in words."""
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
