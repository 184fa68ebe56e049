"""Rows of a cache, and free slots for the tokens that follow."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from heretic.model.kv_cache import SLOTS_AT_ONCE, GrowingLayer, make_room, rows_selectable, select_rows
from tests.tiny import tiny_model


def states(tokens: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, tokens, 8), torch.randn(rows, 2, tokens, 8)


def test_growing_layer_holds_what_transformers_layer_holds() -> None:
    torch.manual_seed(0)
    reference, first = DynamicLayer(), states(5)
    reference.update(*first)
    layer = GrowingLayer(reference, 5 + 2 * SLOTS_AT_ONCE)
    for step in range(SLOTS_AT_ONCE + 10):
        if step == 20:
            for each in (reference, layer):
                each.batch_select_indices(torch.tensor([2, 0]))
        new = states(1, rows=len(reference.keys))
        for ours, theirs in zip(layer.update(*new), reference.update(*new), strict=True):
            assert torch.equal(ours, theirs)
    assert layer.get_seq_length() == reference.get_seq_length()
    assert layer.get_mask_sizes(1) == reference.get_mask_sizes(1)


def test_token_is_written_without_copying_the_others_and_no_more_slots_are_made_than_needed() -> None:
    reference = DynamicLayer()
    reference.update(*states(5))
    layer = GrowingLayer(reference, 5 + 10)
    assert layer.slots[0].shape[-2] == 15
    places = {layer.update(*states(1))[0].data_ptr() for _ in range(10)}
    assert len(places) == 1
    long = GrowingLayer(reference, 1000)
    long.update(*states(1))
    assert long.slots[0].shape[-2] < 6 + SLOTS_AT_ONCE


def test_layers_of_a_sliding_window_stay_as_they_are() -> None:
    model = tiny_model("gemma3")
    with torch.inference_mode():
        cache = model(torch.arange(5, 11)[None].repeat(3, 1), use_cache=True).past_key_values
    kinds = [type(layer) for layer in cache.layers]
    make_room(cache, 20)
    assert rows_selectable(cache) and DynamicSlidingWindowLayer in kinds
    assert [type(layer) for layer in cache.layers] == [GrowingLayer if k is DynamicLayer else k for k in kinds]


def test_rows_are_selected_in_order_and_repeatedly() -> None:
    cache, (keys, values) = DynamicCache(), states(4)
    cache.update(keys, values, 0)
    select_rows(cache, [2, 0, 2])
    assert torch.equal(cache.layers[0].keys, keys[[2, 0, 2]]) and torch.equal(cache.layers[0].values, values[[2, 0, 2]])
