"""Compute the memory of a run on every device: what stays, and the largest of its phases.

Exact: weights. Counted from the code that uses them, at their largest: the passes (`planning.pass_memory`), cached data of the
original, operators. Assumes SDPA or flash attention unless the model has neither, and `CONTEXT`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from heretic.ablation.geometries.conditional import BENIGN_KEYS, HARMFUL_KEYS
from heretic.ablation.weight_stats import ELEMENTS_PER_CHUNK
from heretic.hardware.devices import CPU, Device
from heretic.model.batching import FEWEST_TOKENS, TOKENS_AT_ONCE, groups_in_turn
from heretic.model.forward import LOGIT_ROWS
from heretic.model.kv_cache import SLOTS_AT_ONCE
from heretic.model.probe import TOKENS as PROBE_TOKENS
from heretic.planning.model_dims import ModelDims
from heretic.planning.pass_memory import (
    DIVERGENCE,
    DIVERGENCE_WITH_GRADIENTS,
    FLOAT32,
    INT64,
    SHARE_FOR_GRADIENTS,
    TOKENS_WITH_GRADIENTS,
    WRITERS,
    PassMemory,
    Rows,
    rows_with_gradients,
)
from heretic.planning.placement import DeviceShare
from heretic.planning.workload import Workload
from heretic.scoring.gradient_loss import TOKENS_PER_CHUNK
from heretic.scoring.refusal_proxy import MAX_DRAFT_TOKENS

MIB, GIB = 2**20, 2**30

# A CUDA context with the kernels of a run, and as much for other accelerators. An assumption, not a measurement. Reported are
# 0.29 GB for a first kernel (pytorch/pytorch pull request 86509), about 400 MB (issue 109888) and 426 MiB for PyTorch 2.10 on an
# RTX 6000 Ada (unslothai/unsloth-zoo pull request 1053).
CONTEXT = 512 * MIB
# RAM of Python and the libraries before loading, without file pages: 380 MB measured (dev/LOG.md).
PROGRAM = 384 * MIB

MASKS = 5  # of the slots of the cache, while decoding: before and after each change, and the ids of the tokens
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
    # The phases, besides these
    loading: int = 0  # merging or dequantizing the largest weight
    weight_stats: int = 0  # of one weight
    residuals: int = 0  # capturing them
    gradients: int = 0  # gradient search with its logits
    prefill: int = 0  # of a trial: KL divergence and drafts
    decoding: int = 0
    verification: int = 0  # of the export
    # Attached in some phases
    operators: int = 0  # of a trial
    rounds: int = 0  # operators of the directions from iterative rounds
    headroom: int = 0  # for fragmentation; on the CPU for everything else

    @property
    def trial(self) -> int:
        """Bytes of a trial."""
        return self.operators + self.rounds + max(self.prefill, self.decoding)

    @property
    def run(self) -> int:
        """Bytes of the largest phase, without the memory needed in all phases."""
        return max(
            self.loading, self.weight_stats, self.rounds + self.residuals, self.gradients, self.trial, self.verification
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
    merged: int = 0  # bytes of the largest weight that loading makes of several tensors of the checkpoint

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
        if not used:  # max_memory leaves no room for a module
            return ()
        runs = {device.key: placed[device.key] for device in used}
        borrowed = 0
        if CPU in runs and used[0].is_gpu:  # offloaded blocks run on the first GPU, one at a time
            first, waiting = used[0].key, placed[CPU]
            runs[first] = DeviceShare(0, runs[first].blocks + waiting.blocks, head=runs[first].head or waiting.head)
            runs[CPU] = DeviceShare()
            borrowed = waiting.weights // max(1, len(waiting.blocks))
        groups = 1 if borrowed else self._groups(runs.values())
        # Like the gradient search after loading: by the fullest of the devices that run blocks.
        room = [d.free - placed[d.key].weights - _context(d) for d in used if runs[d.key].blocks]
        rows, checkpointing = self._gradient_rows(max(0, min(room, default=0)), batch, on_cpu=not used[0].is_gpu)
        loads = []
        for device in used:
            extra = borrowed if device is used[0] else 0
            load = self._memory_without_gradients(device, placed[device.key], runs[device.key], batch, extra, groups)
            gradients = self._gradients(runs[device.key], rows, extra, groups, checkpointing=checkpointing)
            if not replace(load, gradients=gradients).fits:  # the gradient search uses one row when memory runs out
                gradients = self._gradients(runs[device.key], 1, extra, 1, checkpointing=True)
            loads.append(replace(load, gradients=gradients))
        return tuple(loads)

    def _groups(self, runs: Collection[DeviceShare]) -> int:
        """Return what `LanguageModel.groups` is for a model with these shares."""
        return max(1, sum(bool(share.blocks) for share in runs))

    @property
    def minimum(self) -> int:
        """Bytes that any device needs besides weights, with one row; the placement leaves them free."""
        one_row = PassMemory(self.shape, 1).forward(
            Rows(1, self.work.tail + self.work.tried_tokens, self.work.shared_tokens)
        )
        return max(self._weight_stats() if self.work.needs_weight_stats else 0, one_row + self.dequantized)

    def largest_batch(self, placed: Mapping[int | str, DeviceShare], devices: Sequence[Device], largest: int) -> int:
        """Return the largest batch that fits with memory to spare, else the largest that fits, else 0.

        Tried are powers of two, and the rows of 1, 2, 4 … whole trials.
        """
        powers = [2**n for n in range(largest.bit_length())]
        trials = {count * self.work.requests for count in powers if self.work.requests}
        sizes = sorted({*powers, *trials} & set(range(1, largest + 1)), reverse=True)
        loads = {size: self.device_memory(placed, devices, size) for size in sizes}
        fitting = [size for size in sizes if all(load.fits for load in loads[size])]
        roomy = [size for size in fitting if not any(load.tight for load in loads[size])]
        return next(iter(roomy or fitting), 0)

    def _memory_without_gradients(
        self, device: Device, holds: DeviceShare, runs: DeviceShare, batch: int, borrowed: int, groups: int
    ) -> DeviceMemory:
        shape, work, blocks = self.shape, self.work, len(runs.blocks)
        vectors = WRITERS * blocks * work.trials_per_batch(batch) * shape.hidden * FLOAT32
        passes = PassMemory(shape, blocks, runs.embedding, readers=work.readers)
        run = _Passes(passes, work, runs.head, groups)
        more = borrowed + (self.dequantized + self._converted(batch) if blocks else 0)
        captured = 0 if device.is_gpu else blocks * shape.hidden * FLOAT32 * min(batch, work.training)
        # Of quantized weights the numbers, scaled and rounded.
        loading = max(self.dequantization * (2 * FLOAT32 + shape.element), self.merged) if holds.blocks else 0
        rows, trials = work.trial_rows(batch), work.trials_per_batch(batch)
        return DeviceMemory(
            device=device,
            layers=holds.describe(),
            weights=holds.weights,
            context=_context(device),
            kept=0 if device.is_gpu else self._kept(max(0, device.free - holds.weights)),
            copies=len(holds.blocks) * shape.edited * shape.element if self.weight_copies else 0,
            loading=max(loading, run.probe()),
            weight_stats=self._weight_stats() if work.needs_weight_stats and blocks else 0,
            residuals=run.prompts(min(batch, work.training), hooked=work.rounds > 0) + captured + more,
            prefill=max(run.divergence(rows, trials), run.drafts(rows, trials)) + more,
            decoding=run.decoding(rows, trials) + more,
            verification=max(loading, run.verification(min(batch, work.most_prompts)) + more),
            operators=vectors * (2 * work.directions + 1)  # u, w, n; a
            + self._input_vectors(blocks, trials)
            + FLOAT32 * blocks * trials * work.directions * passes.reader_numbers,
            rounds=vectors * 2 * work.directions * work.rounds,
            headroom=headroom(device, holds.weights),
        )

    def _weight_stats(self) -> int:
        """Return the bytes of rows of a weight in float32 and their squares, or of its products with all directions."""
        shape, work = self.shape, self.work
        chunk = min(ELEMENTS_PER_CHUNK, shape.hidden * shape.widest_writer) * FLOAT32
        converted = chunk * (shape.element != FLOAT32)
        directions = shape.blocks * work.directions * (1 + work.rounds)
        products = directions * (3 * shape.hidden + shape.widest_writer) * FLOAT32
        return max(converted + chunk + 4 * shape.hidden * FLOAT32, converted + products) + self.dequantized

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

    def _converted(self, batch: int) -> int:
        """Return the bytes of a part of a writer's inputs in float32, for operators that read them."""
        inputs = min(batch * (self.work.tail + self.work.tried_tokens), TOKENS_AT_ONCE) * self.shape.widest_writer
        return FLOAT32 * min(inputs, ELEMENTS_PER_CHUNK) if self.work.reads_inputs else 0

    @property
    def _inputs(self) -> int:
        """Inputs of an attention output projection and of an MLP down projection, together."""
        return self.shape.attended + max(self.shape.intermediate, self.shape.experts_used * self.shape.expert)

    def _input_vectors(self, blocks: int, trials: int) -> int:
        """Return the bytes of the vectors of operators that read the writers' inputs."""
        return FLOAT32 * blocks * trials * self.work.directions * self._inputs if self.work.needs_input_maps else 0

    def _gradient_rows(self, free: int, batch: int, *, on_cpu: bool) -> tuple[int, bool]:
        """Return the rows of a pass with gradients, and whether it needs gradient checkpointing."""
        gradient_path = self.work.gradient_search
        if gradient_path is None:
            return 0, False
        more = max(gradient_path.refusal_tokens, gradient_path.kl_tokens) - 1
        budget = int(SHARE_FOR_GRADIENTS * free)
        lengths = (self.work.prompt_tokens + more, self.work.tail + more)
        work = self.work
        rows, checkpointing = rows_with_gradients(
            self.shape, budget, *lengths, on_cpu=on_cpu, inputs=work.needs_input_maps, readers=work.readers
        )
        return min(rows, batch, gradient_path.batch), checkpointing

    def _gradients(self, runs: DeviceShare, rows: int, borrowed: int, most: int, *, checkpointing: bool) -> int:
        gradient_path, work, blocks = self.work.gradient_search, self.work, len(runs.blocks)
        if gradient_path is None or not (blocks or runs.head):
            return 0
        # A pass computes the shared prefix once, except with gradient checkpointing.
        shared = 0 if checkpointing else work.shared_tokens
        last = self.shape.blocks - 1 in runs.blocks
        passes = PassMemory(self.shape, blocks, runs.embedding, last, work.readers)
        found = 0
        for places, per_logit in (
            (gradient_path.kl_tokens, DIVERGENCE_WITH_GRADIENTS),
            (gradient_path.refusal_tokens, TOKENS_WITH_GRADIENTS),
        ):
            taken = Rows(rows, max(1, work.prompt_tokens - shared) + places - 1, shared)
            groups = groups_in_turn(most, rows, taken.new)
            part = taken.part(groups)
            head = passes.head(part, part.count * places, TOKENS_PER_CHUNK, per_logit) if runs.head else 0
            inputs = work.needs_input_maps
            found = max(
                found, passes.gradients(taken, checkpointing=checkpointing, head=head, inputs=inputs, groups=groups)
            )
        return found + self._converted(rows) + self.dequantized + borrowed


@dataclass(frozen=True)
class _Passes:
    """The passes of a run on one device."""

    memory: PassMemory
    work: Workload
    head: bool
    groups: int  # micro-batches in turn, at most

    def _rows(self, rows: int, more: int) -> Rows:
        """Return prompts of the largest length with `more` further tokens: `rows`, or as many as are under way together."""
        most = max(1, self.groups * TOKENS_AT_ONCE // (self.work.prompt_tokens + more))
        return Rows(min(rows, most), self.work.tail + more, self.work.shared_tokens)

    def _part(self, rows: Rows, *, decoding: bool = False) -> Rows:
        """Return the micro-batch of these rows that runs at a time."""
        return rows.part(groups_in_turn(self.groups, rows.count, rows.count if decoding else rows.new))

    def _prefix(self, trials: int = 1) -> int:
        """Bytes of the shared prefix's keys and values, of which every trial has its own."""
        return self.memory.blocks * self.memory.layer(self.work.shared_tokens * trials)

    def probe(self) -> int:
        """Bytes of the passes that find the writers after loading; the logits return to the device of the embedding."""
        rows, dims = Rows(1, len(PROBE_TOKENS)), self.memory.dims
        kept = rows.new * dims.element * ((self.memory.blocks + 4) * dims.hidden + 2 * dims.normalized)
        logits = rows.new * dims.vocabulary * dims.element if self.head or self.memory.embedding else 0
        return kept + max(self.memory.forward(rows), logits)

    def prompts(self, rows: int, *, hooked: bool) -> int:
        """Bytes of a pass over prompts without logits."""
        prompts, shared = self._part(self._rows(rows, 0)), bool(self.work.shared_tokens)
        cached = self.memory.cache(prompts) + self._prefix() if shared else 0
        return cached + self.memory.forward(prompts, hooked=hooked, cached=shared)

    def divergence(self, rows: int, trials: int = 1, *, hooked: bool = True) -> int:
        """Bytes of the pass for the KL divergence; without operators of that for the log-probabilities alone."""
        places = max(self.work.kl_tokens, self.work.read_tokens)
        texts = self._part(self._rows(rows, places - 1))
        shared = bool(self.work.shared_tokens)
        cached = self.memory.cache(texts) + self._prefix(trials) if shared else 0
        logits = 0
        if self.head and hooked:
            logits = self.memory.head(texts, texts.count * places, LOGIT_ROWS, DIVERGENCE)
        elif self.head:
            logits = self.memory.log_probs(texts, texts.count * places, LOGIT_ROWS)
        return cached + max(self.memory.forward(texts, hooked=hooked, cached=shared), logits)

    def _row_counts(self, rows: int) -> set[int]:
        """Return how many rows decode at first, and the most that run as one micro-batch once the others have ended."""
        return {rows, min(rows, 2 * FEWEST_TOKENS - 1)} if self.groups > 1 else {rows}

    def drafts(self, rows: int, trials: int = 1, tokens: int = MAX_DRAFT_TOKENS, *, hooked: bool = True) -> int:
        """Bytes of the passes over requests with drafts of `tokens` tokens, whose keys and values decoding needs."""
        return max(self._drafts(count, trials, tokens, hooked=hooked) for count in self._row_counts(rows))

    def _drafts(self, rows: int, trials: int, tokens: int, *, hooked: bool) -> int:
        under_way = self._rows(rows, tokens)
        texts = self._part(under_way, decoding=True)
        logits = self.memory.log_probs(texts, texts.count * max(1, tokens), LOGIT_ROWS) if self.head else 0
        working = max(self.memory.forward(texts, hooked=hooked), logits)
        return self.memory.cache(under_way) + self._prefix(trials) + working

    def decoding(self, rows: int, trials: int = 1, drafts: int = MAX_DRAFT_TOKENS, *, hooked: bool = True) -> int:
        """Bytes of decoding the last tokens of answers that have not ended."""
        return max(self._decoding(count, trials, drafts, hooked=hooked) for count in self._row_counts(rows))

    def _decoding(self, rows: int, trials: int, drafts: int, *, hooked: bool) -> int:
        memory, work, dims = self.memory, self.work, self.memory.dims
        length = work.prompt_tokens + drafts + work.new_tokens - 1
        # A batch of short prompts has the most rows, and each gets as many new tokens as a long one.
        most = max(self.groups * TOKENS_AT_ONCE, work.prompt_tokens + drafts)
        slots = min(rows * length, most + rows * work.new_tokens)
        step = self._part(Rows(rows, 1, slots // rows - 1), decoding=True)
        own = step.count * slots // rows  # slots of this micro-batch
        # While a layer grows, its old keys and values exist too; a sliding window grows at every token.
        old = own - step.count * (1 if dims.windowed else min(work.new_tokens, SLOTS_AT_ONCE))
        growing = memory.layer(old) if memory.blocks else 0
        logits = step.count * dims.vocabulary * dims.element if self.head else 0
        working = max(memory.forward(step, hooked=hooked, cached=False), growing, logits)
        masks = (1 + dims.windowed) * INT64 * (slots + (MASKS - 1) * own) if memory.blocks else 0
        return memory.blocks * memory.layer(slots) + self._prefix(trials) + working + masks

    def verification(self, rows: int) -> int:
        """Bytes of measuring an exported model: without operators and drafts."""
        return max(
            self.divergence(rows, hooked=False),
            self.drafts(rows, tokens=0, hooked=False),
            self.decoding(rows, drafts=0, hooked=False),
        )


def headroom(device: Device, weights: int) -> int:
    """Return the bytes reserved for fragmentation on a GPU, or for everything else on the CPU."""
    return max(GIB, device.total * 8 // 100) - CONTEXT if device.is_gpu else 512 * MIB + weights // 20 - PROGRAM


def _context(device: Device) -> int:
    return CONTEXT if device.is_gpu else PROGRAM
