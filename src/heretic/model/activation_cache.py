"""What the original's blocks receive for a fixed list of prompts, so that a trial's pass begins at the first block it edits.

Nothing is computed for it: what the passes of the first trials go through below their first edited block is the original's,
and is kept on the way. So it grows with the study, upwards, as far as the trials reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heretic.model.architecture import first_tensor
from heretic.model.patching import replaced_forward

# Fewer blocks at which a pass can begin are not worth the memory.
MIN_CACHED_LAYERS = 4


class ActivationCache:
    """Hidden states at the entry of blocks, and the keys and values of the blocks below, for the tokens of `sequences`.

    Kept in RAM, as one row a token; `start` tokens that all sequences begin with are left out (`beginning` holds them, as
    a list of one sequence). Hidden states are kept at every `stride`-th block, keys and values (`with_cache`) of all.
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
        self.depth = torch.zeros(len(sequences), dtype=torch.long)  # blocks below this one are known, by sequence
        self.hidden: dict[int, Tensor] = {}  # by block: [tokens, width]
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}  # by block: keys and values [tokens, heads, width of a head]
        self.devices: dict[int, torch.device] = {}  # by block: where its cache lies, which is where the block runs
        self.also_returned: int | None = None  # of blocks that return a tuple: how much more than the hidden states

    def resume_layer(self, rows: Sequence[int], first_edited: int) -> int:
        """The block at which a pass over these sequences can begin; 0: with the embeddings."""
        known = min(int(self.depth[list(rows)].min()), first_edited, len(self.blocks) - 1)
        return max((layer for layer in self.hidden if layer <= known), default=0)

    @contextmanager
    def resume_and_record(self, rows: Sequence[int], first_edited: int, device: torch.device) -> Iterator[int]:
        """Within the context a pass over these rows begins at `entry`, and what it goes through below `first_edited` is kept.

        Gives the block at which it begins. The caller fills in the cache of the blocks below with `extend`.
        """
        begins = self.resume_layer(rows, first_edited)
        ends = min(first_edited, len(self.blocks) - 1)
        places = self._places(rows)
        with ExitStack() as stack:
            if begins:
                given = self._gather(self.hidden[begins], places).to(device, non_blocking=True)
                stack.enter_context(self._skipped(begins, given))
            for layer in range(begins + 1, ends + 1):
                if layer % self.stride == 0:
                    stack.enter_context(self._kept(layer, places))
            yield begins

    def update_kv_cache(self, cache: Any, rows: Sequence[int], begins: int, first_edited: int) -> None:
        """After a pass: give `cache` the keys and values of the blocks that were skipped, and keep those of the blocks that
        were run below `first_edited`."""
        places = self._places(rows)
        ends = min(first_edited, len(self.blocks) - 1)
        if self.with_cache and cache is not None:
            for layer in range(begins):
                keys, values = (self._gather(t, places).transpose(1, 2) for t in self.cache[layer])
                target = self.devices[layer]
                cache.update(keys.to(target, non_blocking=True), values.to(target, non_blocking=True), layer)
            for layer in range(begins, ends):
                if layer not in self.cache:
                    self.devices[layer] = cache.layers[layer].keys.device
                    self.cache[layer] = tuple(  # type: ignore[assignment]
                        self._empty(t.shape[1::2], t.dtype)
                        for t in (cache.layers[layer].keys, cache.layers[layer].values)
                    )
                for kept, now in zip(
                    self.cache[layer], (cache.layers[layer].keys, cache.layers[layer].values), strict=True
                ):
                    self._scatter(kept, places, now[:, :, -places.shape[1] :].transpose(1, 2))
        if cache is not None or not self.with_cache:
            index = torch.tensor(list(rows))
            self.depth[index] = torch.maximum(self.depth[index], torch.tensor(ends))

    @contextmanager
    def _kept(self, layer: int, places: Tensor) -> Iterator[None]:
        def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
            now = first_tensor(output)
            if now.ndim != 3:
                raise ValueError("the blocks hand on something else than hidden states [rows, tokens, width]")
            if layer not in self.hidden:
                self.hidden[layer] = self._empty(now.shape[2:], now.dtype)
            self._scatter(self.hidden[layer], places, now)
            self.also_returned = len(output) - 1 if isinstance(output, tuple) else None

        handle = self.blocks[layer - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _skipped(self, first: int, hidden: Tensor) -> Iterator[None]:
        """Within the context the blocks before `first` compute nothing; what reaches `first` is `hidden`."""
        returned = hidden if self.also_returned is None else (hidden, *[None] * self.also_returned)
        with ExitStack() as stack:
            for block in self.blocks[:first]:
                stack.enter_context(replaced_forward(block, lambda *_, **__: returned))
            yield

    def _places(self, rows: Sequence[int]) -> Tensor:
        """Where each token of a batch lies in what is kept [rows, tokens]; -1 for padding, which is on the left."""
        index = torch.tensor(list(rows))
        lengths, offsets = self.lengths[index, None], self.offsets[index, None]
        from_end = torch.arange(int(lengths.max())).flip(0)[None]
        return torch.where(from_end < lengths, offsets + lengths - 1 - from_end, -1)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # so that passes with gradients may read and write it as well
            return torch.zeros(int(self.lengths.sum()), *shape, dtype=dtype, pin_memory=torch.cuda.is_available())

    @staticmethod
    def _gather(kept: Tensor, places: Tensor) -> Tensor:
        return kept[places.clamp_min(0)]

    @staticmethod
    def _scatter(kept: Tensor, places: Tensor, now: Tensor) -> None:
        real = places >= 0
        kept[places[real]] = now.to("cpu")[real]


def allocate_cache(
    blocks: nn.ModuleList,
    sequences: Sequence[list[int]],
    beginning: list[int],
    *,
    with_cache: bool,
    bytes_per_token: tuple[int, int],
    budget: int,
) -> ActivationCache | None:
    """Room for the entries of these sequences within `budget` bytes of RAM, at as many blocks as fit; None if not even four do.

    `bytes_per_token` are those of a hidden state, and of the keys and values of one block.
    """
    tokens = sum(len(s) - len(beginning) for s in sequences)
    hidden, cache = bytes_per_token
    fixed = len(blocks) * (tokens * cache * with_cache + len(beginning) * (hidden + cache))
    stations = (budget - fixed) // max(1, tokens * hidden)
    if stations < MIN_CACHED_LAYERS:
        return None
    start = len(beginning)
    first = ActivationCache(blocks, [beginning], with_cache=True) if beginning else None
    stride = -(-len(blocks) // stations)
    return ActivationCache(blocks, sequences, start=start, stride=stride, with_cache=with_cache, beginning=first)
