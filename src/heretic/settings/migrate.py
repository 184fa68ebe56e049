"""Convert settings of heretic-llm (PyPI, names and defaults of version 1.4.0)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic.errors import SettingsError, plain_line
from heretic.settings.sources import check_types, read_toml
from heretic.settings.toml import toml_value


@dataclass(frozen=True)
class HereticLlmSetting:
    """The counterpart of one heretic-llm setting."""

    ours: str = ""  # our key; empty: no counterpart
    value: Callable[[Any], Any] = lambda value: value  # converts a value
    note: str = ""


GEOMETRIES = {"none": "plain", "pre": "row_normalized", "full": "norm_preserving"}
PROMPT_SETS = {
    "good_prompts": "harmless_train",
    "bad_prompts": "harmful_train",
    "good_evaluation_prompts": "harmless_eval",
    "bad_evaluation_prompts": "harmful_eval",
}
PROMPT_KEYS = {"dataset": "source", "split": "split", "column": "column", "prefix": "prefix", "suffix": "suffix"}
TABLE: dict[str, HereticLlmSetting] = {
    "model": HereticLlmSetting("model"),
    "model_commit": HereticLlmSetting("revision"),
    "evaluate_model": HereticLlmSetting(note="heretic evaluate MODEL --against ORIGINAL"),
    "collect_reproducibles": HereticLlmSetting(note="every export contains a manifest"),
    "reproduce": HereticLlmSetting(note="heretic reproduce MANIFEST"),
    "dtypes": HereticLlmSetting("dtypes"),
    "quantization": HereticLlmSetting("quantization"),
    "device_map": HereticLlmSetting("device_map", note='remove "auto": the default here is "planned"'),
    "max_memory": HereticLlmSetting("max_memory"),
    "offload_outputs_to_cpu": HereticLlmSetting(note="not needed: outputs on the device are small"),
    "batch_size": HereticLlmSetting("batch_size"),
    "max_batch_size": HereticLlmSetting(note="heretic plans the batch size and halves it when memory runs out"),
    "max_response_length": HereticLlmSetting("max_response_length"),
    "response_prefix": HereticLlmSetting("response_prefix"),
    "chain_of_thought_skips": HereticLlmSetting(note='response_prefix = "auto" disables or closes a thinking block'),
    "print_responses": HereticLlmSetting(note="heretic compare RUN shows a trial's responses beside the original's"),
    "print_residual_geometry": HereticLlmSetting(note="heretic geometry, and the report of every run"),
    "plot_residuals": HereticLlmSetting(note="heretic geometry, and the report of every run"),
    "residual_plot_path": HereticLlmSetting(note="heretic geometry --html FILE"),
    "residual_plot_title": HereticLlmSetting(),
    "residual_plot_style": HereticLlmSetting(),
    "kl_divergence_scale": HereticLlmSetting(note="not needed: the search does not scale its two objectives"),
    "kl_divergence_target": HereticLlmSetting("search.kl_floor"),
    "orthogonalize_direction": HereticLlmSetting("directions.project_harmless"),
    "row_normalization": HereticLlmSetting("ablation.geometry", GEOMETRIES.__getitem__),
    "full_normalization_lora_rank": HereticLlmSetting(
        note="not needed: edits are exact; lora_rank is for LoRA exports"
    ),
    "winsorization_quantile": HereticLlmSetting("directions.winsorize"),
    "n_trials": HereticLlmSetting("n_trials"),
    "n_startup_trials": HereticLlmSetting("search.n_startup_trials"),
    "seed": HereticLlmSetting("seed"),
    "study_checkpoint_dir": HereticLlmSetting("runs_dir", note="heretic cannot continue studies of heretic-llm"),
    "benchmarks": HereticLlmSetting(note="heretic benchmark RUN --tasks ..."),
    "export_strategy": HereticLlmSetting(note="heretic export RUN --format lora for a LoRA adapter"),
    "max_shard_size": HereticLlmSetting(note="not needed: an export has the base model's checkpoint shards"),
    "refusal_markers": HereticLlmSetting("refusal_markers"),
    "system_prompt": HereticLlmSetting("system_prompt"),
}
# Defaults of heretic-llm that differ from ours and affect the scores.
DEFAULTS: dict[str, Any] = {"system_prompt": "You are a helpful assistant."}


def from_heretic(file: Path) -> str:
    """Convert a config.toml of heretic-llm to ours, with comments for settings that have no counterpart.

    Raises SettingsError for an unreadable file or an invalid value.
    """
    theirs = read_toml(file).values
    ours: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in {**DEFAULTS, **theirs}.items():
        if name in PROMPT_SETS:
            notes += _prompt_set(name, value, ours)
            continue
        known = TABLE.get(name)
        if known is None or not known.ours:
            notes.append(f"{name}: {(known.note if known else '') or 'no counterpart'}")
            continue
        ours[known.ours] = _converted(known, value)
        if known.note:
            notes.append(f"{name}: {known.note}")
    check_types(ours, str(file))
    return _text(ours, [f"Converted from {file.name}, a settings file of heretic-llm.", *notes])


def _converted(known: HereticLlmSetting, value: Any) -> Any:
    try:
        return known.value(value)
    except (KeyError, TypeError):
        return value  # validation of all settings reports the problem


def _prompt_set(name: str, value: Mapping[str, Any], ours: dict[str, Any]) -> list[str]:
    """Convert a prompt set; return notes on its other keys. Raises SettingsError if it is not a table."""
    if not isinstance(value, Mapping):
        raise SettingsError(
            f"The prompt set '{name}' must be a table, not {type(value).__name__}.",
            where=name,
            fix=f"write it as a table: [{name}]",
        )
    for key, mine in PROMPT_KEYS.items():
        if key in value:
            ours[f"prompts.{PROMPT_SETS[name]}.{mine}"] = value[key]
    return [f"{name}.{key}: not converted" for key in value if key not in PROMPT_KEYS]


def _text(ours: Mapping[str, Any], notes: list[str]) -> str:
    """Return the settings as TOML: top-level keys first, then the tables."""
    lines = [f"# {plain_line(note)}" for note in notes]
    tables: dict[str, list[str]] = {}
    for key, value in ours.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {toml_value(value)}")
    for table in sorted(tables):
        lines += ["", f"[{table}]"] if table else [""]
        lines += tables[table]
    return "\n".join(lines) + "\n"
