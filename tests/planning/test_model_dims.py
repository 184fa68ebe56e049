"""Sizes read from configs that spell them differently."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3Config

from heretic.planning.model_dims import ModelDims
from tests.tiny import FAMILIES

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def shape(config: Any, dtype: torch.dtype = torch.bfloat16) -> ModelDims:
    return ModelDims.of(config, SimpleNamespace(dtype=dtype, named_modules=lambda: [], named_parameters=lambda: []))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "cache", "intermediate", "edited"),
    [
        (LlamaConfig(**SIZES, intermediate_size=256), 64, 256, 64 * 320),
        (Qwen3Config(**SIZES, head_dim=32, intermediate_size=100), 128, 100, 64 * 228),
        (GPT2Config(n_embd=64, n_head=4, n_layer=3), 128, 256, 64 * (64 + 256)),
        (
            MixtralConfig(
                hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=128, num_local_experts=8
            ),
            128,
            128,
            64 * (64 + 8 * 128),
        ),
        (
            PretrainedConfig(
                hidden_size=64,
                num_attention_heads=4,
                num_key_value_heads=[1, 2],
                intermediate_size=[10, 300],
                qk_nope_head_dim=16,
                qk_rope_head_dim=8,
                v_head_dim=12,
            ),
            4 * (24 + 12),
            300,
            64 * (48 + 300),
        ),
    ],
)
def test_sizes(config: Any, cache: int, intermediate: int, edited: int) -> None:
    found = shape(config)
    assert (found.cache_per_token, found.intermediate, found.edited) == (cache, intermediate, edited)


def test_element_follows_the_number_format() -> None:
    assert shape(LlamaConfig()).element == 2 and shape(LlamaConfig(), torch.float32).element == 4


@pytest.mark.parametrize(
    ("family", "normalized"),
    [("llama", 2 * 32), ("gemma3", 4 * 32 + 4 * 8 + 2 * 8), ("gpt2", 2 * 32), ("olmo2", 3 * 32 + 16)],
)
def test_norms_of_a_block_are_counted(family: str, normalized: int) -> None:
    name, sizes = FAMILIES[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))
    assert ModelDims.of(model.config, model).normalized == normalized
