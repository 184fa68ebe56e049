"""Cache of the original model's block inputs for fixed prompts: a trial's pass starts at the first block that it edits.

It costs no extra pass. Below a trial's first edited block the activations are the original's, so ordinary passes record them,
and the cache grows upwards as far as the trials reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from heretic.model.architecture import first_tensor
from heretic.model.patching import forward_hooks, replaced_forward
from heretic.model.stages import device_of
from heretic.model.transfer import RowsToStore, rows_to_device

# With fewer cached layers the saved compute is not worth the memory.
MIN_CACHED_LAYERS = 4


@dataclass(eq=False)
class Recording:
    """What one pass adds to the cache, on its way to RAM."""

    rows: list[int]  # its sequences
    first_run: int  # block at which it starts
    last: int  # first edited block, whose input is the last that is recorded
    complete: bool = False  # whether everything was launched
    tensors: RowsToStore = field(default_factory=RowsToStore)


class ActivationCache:
    """Input hidden states of blocks, and keys and values of the blocks below, for the tokens of `sequences`, in RAM.

    Args:
        blocks: The decoder blocks.
        sequences: Token ids of every prompt.
        start: Number of shared prefix tokens, which are not stored here.
        stride: Hidden states are stored at every `stride`-th block.
        with_cache: Whether to store keys and values too, of every block.
        beginning: The cache of the shared prefix, as one sequence.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        sequences: Sequence[list[int]],
        *,
        start: int = 0,
        stride: int = 1,
        with_cache: bool = False,
        beginning: ActivationCache | None = None,
    ) -> None:
        self.blocks = blocks
        self.start = start
        self.stride = stride
        self.with_cache = with_cache
        self.beginning = beginning
        self.lengths = torch.tensor([len(s) - start for s in sequences])
        self.offsets = self.lengths.cumsum(0) - self.lengths
        self.depth = torch.zeros(len(sequences), dtype=torch.long)  # by sequence: blocks below this one are cached
        self.hidden: dict[int, Tensor] = {}  # by block: [tokens, width]
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}  # by block: keys and values [tokens, heads, width of a head]
        self.devices: dict[int, torch.device] = {}  # by block: the device it runs on
        self.also_returned: int | None = None  # if blocks return a tuple: its length less one
        self._recordings: list[Recording] = []  # of passes whose results nobody has read yet

    def resume_layer(self, rows: Sequence[int], first_edited: int) -> int:
        """Return the block at which a pass over these sequences can start; 0 means at the embeddings."""
        cached = min(int(self.depth[list(rows)].min()), first_edited, len(self.blocks) - 1)
        return max((layer for layer in self.hidden if layer <= cached), default=0)

    @contextmanager
    def resume_and_record(self, rows: Sequence[int], first_edited: int) -> Iterator[Recording]:
        """Start a pass within the context at a cached block, and record the hidden states below `first_edited`.

        The caller adds keys and values with `update_kv_cache`, and calls `store` when it has read the results of the pass.
        """
        first_run = self.resume_layer(rows, first_edited)
        recording = Recording(list(rows), first_run, min(first_edited, len(self.blocks) - 1))
        self._recordings.append(recording)
        indices = self._token_indices(rows)
        with ExitStack() as stack:
            if first_run:
                hidden = self._gather(self.hidden[first_run], indices, device_of(self.blocks[first_run]))
                stack.enter_context(self._skipped(first_run, hidden))
            for layer in range(first_run + 1, recording.last + 1):
                if layer % self.stride == 0:
                    stack.enter_context(self._recorded(layer, indices, recording))
            yield recording

    def update_kv_cache(self, cache: Any, recording: Recording) -> None:
        """Fill `cache` with the keys and values of skipped blocks, and record those of blocks run below the first edited one."""
        indices = self._token_indices(recording.rows)
        if self.with_cache and cache is not None:
            for layer in range(recording.first_run):
                keys, values = (self._gather(t, indices, self.devices[layer]) for t in self.cache[layer])
                cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
            for layer in range(recording.first_run, recording.last):
                both = (cache.layers[layer].keys, cache.layers[layer].values)
                if layer not in self.cache:
                    self.devices[layer] = both[0].device
                    keys, values = (self._empty(t.shape[1::2], t.dtype) for t in both)
                    self.cache[layer] = (keys, values)
                for stored, new in zip(self.cache[layer], both, strict=True):
                    recording.tensors.add(stored, indices, new[:, :, -indices.shape[1] :].transpose(1, 2))
        recording.complete = cache is not None or not self.with_cache

    def store(self, rows: Sequence[int] | None = None) -> None:
        """Let later passes use what a pass over these sequences has recorded (None: all passes); waits for the copies."""
        if self.beginning is not None:
            self.beginning.store()
        for recording in [r for r in self._recordings if rows is None or r.rows == rows][: None if rows is None else 1]:
            recording.tensors.write()
            if recording.complete:
                index = torch.tensor(recording.rows)
                self.depth[index] = torch.maximum(self.depth[index], torch.tensor(recording.last))
            self._recordings.remove(recording)

    def discard_recordings(self) -> None:
        """Forget what passes have recorded that failed or were given up."""
        self._recordings.clear()
        if self.beginning:
            self.beginning.discard_recordings()

    @contextmanager
    def _recorded(self, layer: int, indices: Tensor, recording: Recording) -> Iterator[None]:
        def record(_module: nn.Module, _inputs: object, output: Any) -> None:
            hidden = first_tensor(output)
            if hidden.ndim != 3:
                raise ValueError("expected blocks that return hidden states [rows, tokens, width]")
            if layer not in self.hidden:
                self.hidden[layer] = self._empty(hidden.shape[2:], hidden.dtype)
            recording.tensors.add(self.hidden[layer], indices, hidden)
            self.also_returned = len(output) - 1 if isinstance(output, tuple) else None

        with forward_hooks([(self.blocks[layer - 1], record)]):
            yield

    @contextmanager
    def _skipped(self, first: int, hidden: Tensor) -> Iterator[None]:
        """Skip the blocks before `first` within the context, and pass `hidden` to `first`."""
        returned = hidden if self.also_returned is None else (hidden, *[None] * self.also_returned)
        with ExitStack() as stack:
            for block in self.blocks[:first]:
                stack.enter_context(replaced_forward(block, lambda *_, **__: returned))
            yield

    def _token_indices(self, rows: Sequence[int]) -> Tensor:
        """Index of each token of a batch in the stored rows [rows, tokens]; -1 for padding, which is on the left."""
        index = torch.tensor(list(rows))
        lengths, offsets = self.lengths[index, None], self.offsets[index, None]
        from_end = torch.arange(int(lengths.max())).flip(0)[None]
        return torch.where(from_end < lengths, offsets + lengths - 1 - from_end, -1)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # passes with gradients read and write it too
            return torch.zeros(int(self.lengths.sum()), *shape, dtype=dtype)

    @staticmethod
    def _gather(stored: Tensor, indices: Tensor, device: torch.device) -> Tensor:
        return rows_to_device(stored, indices.clamp_min(0).flatten(), device).unflatten(0, indices.shape)


def allocate_cache(
    blocks: nn.ModuleList,
    sequences: Sequence[list[int]],
    beginning: list[int],
    *,
    with_cache: bool,
    bytes_per_token: tuple[int, int],
    budget: int,
) -> ActivationCache | None:
    """Allocate a cache with as many layers as fit into `budget` bytes of RAM; None for fewer than `MIN_CACHED_LAYERS`.

    Args:
        blocks: The decoder blocks.
        sequences: Token ids of every prompt.
        beginning: The tokens that all sequences share.
        with_cache: Whether to store keys and values too.
        bytes_per_token: Bytes of one hidden state, and of one block's keys and values.
        budget: Bytes of RAM.
    """
    tokens = sum(len(s) - len(beginning) for s in sequences)
    hidden, cache = bytes_per_token
    fixed = len(blocks) * (tokens * cache * with_cache + len(beginning) * (hidden + cache))
    cached_layers = (budget - fixed) // max(1, tokens * hidden)
    if cached_layers < MIN_CACHED_LAYERS:
        return None
    start = len(beginning)
    prefix_cache = ActivationCache(blocks, [beginning], with_cache=True) if beginning else None
    stride = -(-len(blocks) // cached_layers)
    return ActivationCache(blocks, sequences, start=start, stride=stride, with_cache=with_cache, beginning=prefix_cache)
