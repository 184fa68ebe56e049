"""The writers of every family are found, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from heretic.model.architecture import find_residual_writers
from tests.helpers.errors import raises
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_one_attention_and_one_mlp_writer_a_layer(family: str) -> None:
    structure = find_residual_writers(tiny_model(family))
    assert structure.num_layers == 4 and structure.width == 32
    assert [(w.layer, w.component) for w in structure.writers] == [
        (i, c) for i in range(4) for c in ("attention", "mlp")
    ]
    assert structure.unrecognized == () and structure.incomplete == ()
    assert all(w.weight().shape[0] == 32 for w in structure.writers)


def test_a_candidate_that_does_not_reach_the_stream_is_left_out() -> None:
    model = tiny_model("llama")
    block = model.model.layers[1]
    block.self_attn.register_module("out_proj", torch.nn.Linear(4, 32))  # right name, right width, never called
    structure = find_residual_writers(model)
    assert [w.name for w in structure.writers if w.layer == 1] == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert structure.unrecognized == ("model.layers.1.self_attn.out_proj",)


def test_a_model_without_such_blocks_is_refused() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.num_hidden_layers = 7
    with raises("architecture-not-supported"):
        find_residual_writers(model)
