"""Key-value caches: selecting rows on several devices, and free slots for the tokens that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from heretic.model.transfer import to_device

SLOTS_AT_ONCE = 64  # by which a growing layer grows

# Its own copies the window's size to the GPU for every new cache, which makes the host wait; no pass reads it there.
DynamicSlidingWindowLayer.lazy_initialization = DynamicLayer.lazy_initialization  # type: ignore[method-assign]


class GrowingLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width] in front of free slots: a token is written into one.

    transformers' own layer copies everything at every token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, most: int) -> None:
        """Take the keys and values of a layer that is in use and may have `most` tokens in the end."""
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.most = most
        self._fill((layer.keys, layer.values), layer.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values [rows, heads, new tokens, width]; returns all."""
        before, new = self.keys.shape[-2], key_states.shape[-2]
        after = before + new
        if after > self.slots[0].shape[-2]:
            self._fill((self.keys, self.values), after)
        self.slots[0].narrow(-2, before, new).copy_(key_states)
        self.slots[1].narrow(-2, before, new).copy_(value_states)
        self._show(after)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.slots[:] = [slots[indices] for slots in self.slots]
        self._show(self.keys.shape[-2])

    def _fill(self, stored: tuple[Tensor, Tensor], needed: int) -> None:
        """Copy keys and values into more slots, at least as many as are needed."""
        slots = max(needed, min(needed + SLOTS_AT_ONCE - 1, self.most))
        used = stored[0].shape[-2]
        self.slots: list[Tensor] = [t.new_empty(*t.shape[:-2], slots, t.shape[-1]) for t in stored]
        for room, tensor in zip(self.slots, stored, strict=True):
            room.narrow(-2, 0, used).copy_(tensor)
        self._show(used)

    def _show(self, tokens: int) -> None:
        self.keys, self.values = self.slots[0].narrow(-2, 0, tokens), self.slots[1].narrow(-2, 0, tokens)


class FixedLayer(DynamicLayer):
    """Keys and values [rows, heads, slots, width] in a fixed number of slots; a token goes to a slot that lies on the device.

    A pass attends to all slots, and the mask excludes the free ones.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, slots: int, slot: Tensor) -> None:
        """Take the keys and values of a layer that is in use; `slot` [1] is the next token's, and others advance it."""
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.slot = slot
        free = slots - layer.keys.shape[-2]
        self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, free)) for t in (layer.keys, layer.values))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token [rows, heads, 1, width]; returns all slots."""
        self.keys.index_copy_(-2, self.slot, key_states)
        self.values.index_copy_(-2, self.slot, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens before the next one, as masks count them: all slots but one."""
        return self.keys.shape[-2] - 1


PLAIN = (DynamicLayer, GrowingLayer, FixedLayer)  # layers with the keys and values of all tokens


def keeps_plain_keys(cache: Any) -> bool:
    """Return whether all layers of a cache hold the keys and values of all tokens; layers without any hold something else."""
    layers = getattr(cache, "layers", None) or [None]
    plain = all(type(layer) in PLAIN for layer in layers)
    return plain and all(layer.get_seq_length() for layer in layers)


def first_row(layer: DynamicLayer) -> DynamicLayer:
    """Return a copy of a layer's first row, as transformers makes it."""
    assert layer.keys is not None and layer.values is not None
    copied = DynamicLayer()
    copied.dtype, copied.device, copied.is_initialized = layer.dtype, layer.device, True
    copied.keys, copied.values = layer.keys[:1].clone(), layer.values[:1].clone()
    return copied


def rows_selectable(cache: Any) -> bool:
    """Return whether single rows of a cache can be selected: true for keys and values, not for recurrent states."""
    layers = getattr(cache, "layers", None) or [None]
    return all(type(layer) in (*PLAIN, DynamicSlidingWindowLayer) for layer in layers)


def select_rows(cache: Any, rows: Sequence[int]) -> None:
    """Keep these rows of a cache, in this order and also repeatedly; each device gets the index once."""
    indices: dict[torch.device, Tensor] = {}
    for layer in cache.layers:
        if layer.get_seq_length():
            device = layer.keys.device
            if device not in indices:
                indices[device] = to_device(rows, device)
            layer.batch_select_indices(indices[device])


def make_room(cache: Any, tokens: int) -> None:
    """Give the layers of a cache free slots for at most `tokens` tokens; those of a sliding window and others stay."""
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[i] = GrowingLayer(layer, layer.get_seq_length() + tokens)
