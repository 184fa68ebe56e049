"""Masks whose padding is known equal those for which transformers looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heretic.model.batching import Batcher
from heretic.model.forward import next_token_log_probs
from heretic.model.masks import known_padding
from tests.tiny import tiny_model

SEQUENCES = [list(range(5, 17)), list(range(30, 42)), list(range(50, 55))]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt2", "llama4", "qwen3_next"])
@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2]], ids=["equal lengths", "padded"])
def test_known_padding_changes_no_probability(family: str, rows: list[int]) -> None:
    model = tiny_model(family)
    batch = Batcher(8).batch(rows, SEQUENCES)
    assert batch.padded == (len(rows) == 3)
    known, looked = (next_token_log_probs(model, b) for b in (batch, replace(batch, padded_rows=None)))
    assert torch.equal(known, looked)


def test_nothing_is_known_outside() -> None:
    model, batch = tiny_model("llama"), Batcher(8).batch([0, 1, 2], SEQUENCES)
    arguments = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.inference_mode():
        expected = model(batch.input_ids, **arguments).logits[:, -1]
        with known_padding(False):
            wrong = model(batch.input_ids, **arguments).logits[:, -1]
        after = model(batch.input_ids, **arguments).logits[:, -1]
    assert torch.equal(after, expected) and not torch.allclose(wrong[2], expected[2])
