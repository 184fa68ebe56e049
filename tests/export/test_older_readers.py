"""Configs that programs older than transformers 5 read alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heretic.export.older_readers import config_entries, for_older_readers, tokenizer_entries

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("written", "base", "entries"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5, **YARN}}, {}, {"rope_theta": 5e5, "rope_scaling": YARN}),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            {},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}},
            {"rope_theta": 7, "rope_scaling": YARN},
            {"rope_theta": 7, "rope_scaling": YARN},
        ),
        ({"dtype": "bfloat16"}, {"torch_dtype": "float16", "quantization_config": {}}, {"torch_dtype": "bfloat16"}),
        (
            {
                "rope_parameters": {
                    "rope_theta": 5e5,
                    "rope_type": "default",
                    "mrope_section": [1],
                    "partial_rotary_factor": 0.5,
                }
            },
            {},
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}, "partial_rotary_factor": 0.5},
        ),
        ({"rope_parameters": None, "hidden_size": 4}, {"hidden_size": 8}, {"hidden_size": 4}),
    ],
)
def test_renamed_entries_are_there_under_both_names(
    written: dict[str, Any], base: dict[str, Any], entries: dict[str, Any]
) -> None:
    for nested in (False, True):
        found = (
            config_entries({"text_config": written}, {"text_config": base}) if nested else config_entries(written, base)
        )
        inner = found["text_config"] if nested else found
        assert inner.items() >= entries.items() and "quantization_config" not in inner


def test_the_tokenizer_of_a_gguf_file_has_a_class_that_older_versions_know(tmp_path: Path) -> None:
    saved = {"tokenizer_class": "TokenizersBackend", "is_local": True, "pad_token": "x"}
    assert tokenizer_entries(saved) == {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "x"}
    assert tokenizer_entries({"tokenizer_class": "Qwen2Tokenizer"}) == {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
    for_older_readers(tmp_path, None)
    assert "TokenizersBackend" not in (tmp_path / "tokenizer_config.json").read_text()


def test_the_language_model_of_a_composite_base_gets_nothing_of_its_other_parts() -> None:
    text = {"model_type": "x_text", "rope_theta": 7, "quantization_config": {"bits": 4}}
    base = {
        "model_type": "x",
        "text_config": text,
        "vision_config": {"depth": 2},
        "image_token_id": 5,
        "quantization_config": {},
    }
    assert config_entries({"model_type": "x_text", "vocab_size": 9}, base) == {
        "model_type": "x_text",
        "vocab_size": 9,
        "rope_theta": 7,
    }


def test_a_config_announces_no_layers_that_are_not_there(tmp_path: Path) -> None:
    config = {
        "model_type": "x",
        "num_nextn_predict_layers": 1,
        "text_config": {"mtp_num_hidden_layers": 1, "hidden_size": 8},
    }
    for ahead, number in ((True, 1), (False, 0)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for_older_readers(tmp_path, None, predicts_ahead=ahead)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["num_nextn_predict_layers"] == written["text_config"]["mtp_num_hidden_layers"] == number
        assert "mtp_num_hidden_layers" not in written and written["text_config"]["hidden_size"] == 8
