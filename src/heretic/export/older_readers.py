"""Entries of config files for programs that do not know those of transformers 5: transformers 4, vLLM, llama.cpp.

Only for exports that transformers writes; others keep the base model's files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heretic.files import write_text


def for_older_readers(folder: Path, base: Path | None) -> None:
    """Complete the configs of a written model; `base` is the folder of its base model, None for a GGUF file."""
    config = folder / "config.json"
    _write(config, config_entries(_read(config), _read(base / "config.json") if base else {}))
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


def config_entries(config: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config with the entries of its base model that transformers 5 has renamed.

    Readers that do not know `rope_parameters` would take 10000 for `rope_theta` without a word.
    """
    merged = {**config}
    for key, value in base.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict) and key.endswith("_config"):
            merged[key] = config_entries(config[key], value)
        elif key not in ("quantization_config", "compression_config"):
            merged.setdefault(key, value)
    rope = merged.get("rope_parameters")
    if isinstance(rope, dict):
        whole = rope.get("full_attention", rope)
        local = rope.get("sliding_attention")
        if isinstance(whole, dict) and "rope_theta" in whole:
            merged.setdefault("rope_theta", whole["rope_theta"])
            if whole.get("rope_type", "default") != "default":
                merged.setdefault("rope_scaling", {k: v for k, v in whole.items() if k != "rope_theta"})
        if isinstance(local, dict) and "rope_theta" in local:
            merged.setdefault("rope_local_base_freq", local["rope_theta"])
    if "dtype" in merged:
        merged["torch_dtype"] = merged["dtype"]
    return merged
