"""Entries of config files for programs that do not know those of transformers 5: transformers 4, vLLM, llama.cpp.

Only for exports that transformers writes; others keep the base model's files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heretic.files import write_text

# Numbers of layers for multi-token prediction, in DeepSeek V3, GLM, Qwen3-Next and others.
PREDICTING_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


def for_older_readers(folder: Path, base: Path | None, *, predicts_ahead: bool = True) -> None:
    """Complete the configs of a written model.

    Args:
        folder: the written model's.
        base: the folder of its base model, None for a GGUF file.
        predicts_ahead: whether the layers for multi-token prediction are where the config says; llama.cpp needs them then.
    """
    config = folder / "config.json"
    entries = config_entries(_read(config), _read(base / "config.json") if base else {})
    for part in () if predicts_ahead else (entries, *(v for v in entries.values() if isinstance(v, dict))):
        part |= {name: 0 for name in PREDICTING_LAYERS if name in part}
    _write(config, entries)
    tokenizer = folder / "tokenizer_config.json"
    if base is None and tokenizer.is_file():  # else it is the base model's
        _write(tokenizer, tokenizer_entries(_read(tokenizer)))


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _write(file: Path, data: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def tokenizer_entries(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's config with the class that transformers 4 knows, and without what it does not."""
    kept = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only")}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return kept


def config_entries(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config with the entries of its base model that transformers 5 has renamed.

    Readers that do not know `rope_parameters` would take 10000 for `rope_theta` without a word.
    """
    if "model_type" in base and config.get("model_type") != base["model_type"]:
        base = base.get("text_config") or {}  # the language model of a composite one was opened alone
    merged = {**config}
    for key, value in base.items():
        own = config.get(key)
        if isinstance(own, dict) and isinstance(value, dict) and key.endswith("_config"):
            merged[key] = config_entries(own, value)
        elif key == "rope_scaling" or not isinstance(value, dict):  # no quantization, and no part that was not opened
            merged.setdefault(key, value)
    _add_rope_entries(merged)
    if "dtype" in merged:
        merged["torch_dtype"] = merged["dtype"]
    return merged


def _add_rope_entries(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    whole, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    if isinstance(local, dict) and "rope_theta" in local:
        config.setdefault("rope_local_base_freq", local["rope_theta"])
    if not isinstance(whole, dict):
        return
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in whole:
            config.setdefault(key, whole[key])
    scaling = {k: v for k, v in whole.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling.keys() - {"rope_type"} or scaling.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", scaling)
