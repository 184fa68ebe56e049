"""Sizes read from configs that spell them differently."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3Config

from heretic.planning.model_dims import ModelDims

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def shape(config: Any, dtype: torch.dtype = torch.bfloat16) -> ModelDims:
    return ModelDims.of(config, SimpleNamespace(dtype=dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "cache", "widest", "edited"),
    [
        (LlamaConfig(**SIZES, intermediate_size=256), 64, 256, 64 * 320),
        (Qwen3Config(**SIZES, head_dim=32, intermediate_size=100), 128, 192, 64 * 228),
        (GPT2Config(n_embd=64, n_head=4, n_layer=3), 128, 256, 64 * (64 + 256)),
        (
            MixtralConfig(
                hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=128, num_local_experts=8
            ),
            128,
            256,
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
def test_sizes(config: Any, cache: int, widest: int, edited: int) -> None:
    found = shape(config)
    assert (found.cache_per_token, found.widest, found.edited) == (cache, widest, edited)


def test_element_follows_the_number_format() -> None:
    assert shape(LlamaConfig()).element == 2 and shape(LlamaConfig(), torch.float32).element == 4
