"""Settings of heretic-llm (PyPI, names and defaults as of 1.4.0) said in ours."""

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
    """One of their settings: our key for it (none: there is nothing to set), what a value becomes, and what to know."""

    ours: str = ""
    value: Callable[[Any], Any] = lambda value: value
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
    "collect_reproducibles": HereticLlmSetting(note="every export holds a manifest"),
    "reproduce": HereticLlmSetting(note="heretic reproduce MANIFEST"),
    "dtypes": HereticLlmSetting("dtypes"),
    "quantization": HereticLlmSetting("quantization"),
    "device_map": HereticLlmSetting("device_map", note='"auto" is best left out: "planned" is the default here'),
    "max_memory": HereticLlmSetting("max_memory"),
    "offload_outputs_to_cpu": HereticLlmSetting(note="nothing that large is kept on a device"),
    "batch_size": HereticLlmSetting("batch_size"),
    "max_batch_size": HereticLlmSetting(
        note="the memory plan finds the largest batch; it is halved when memory runs out"
    ),
    "max_response_length": HereticLlmSetting("max_response_length"),
    "response_prefix": HereticLlmSetting("response_prefix"),
    "chain_of_thought_skips": HereticLlmSetting(
        note='response_prefix = "auto" opens and closes a thinking block by itself'
    ),
    "print_responses": HereticLlmSetting(note="heretic compare RUN shows the answers of a trial beside the original's"),
    "print_residual_geometry": HereticLlmSetting(note="heretic geometry, and the report of every run"),
    "plot_residuals": HereticLlmSetting(note="heretic geometry, and the report of every run"),
    "residual_plot_path": HereticLlmSetting(note="heretic geometry --html FILE"),
    "residual_plot_title": HereticLlmSetting(),
    "residual_plot_style": HereticLlmSetting(),
    "kl_divergence_scale": HereticLlmSetting(note="the two objectives are searched as they are, without a scale"),
    "kl_divergence_target": HereticLlmSetting("search.kl_floor"),
    "orthogonalize_direction": HereticLlmSetting("directions.project_harmless"),
    "row_normalization": HereticLlmSetting("ablation.geometry", GEOMETRIES.__getitem__),
    "full_normalization_lora_rank": HereticLlmSetting(note="edits are exact, not of a low rank"),
    "winsorization_quantile": HereticLlmSetting("directions.winsorize"),
    "n_trials": HereticLlmSetting("n_trials"),
    "n_startup_trials": HereticLlmSetting("search.n_startup_trials"),
    "seed": HereticLlmSetting("seed"),
    "study_checkpoint_dir": HereticLlmSetting(
        "runs_dir", note="the studies in it are of another kind and cannot be gone on with"
    ),
    "benchmarks": HereticLlmSetting(note="heretic benchmark RUN --tasks ..."),
    "export_strategy": HereticLlmSetting(note="heretic export RUN --format lora for a LoRA adapter"),
    "max_shard_size": HereticLlmSetting(note="the files of the base model are kept as they are divided"),
    "refusal_markers": HereticLlmSetting("refusal_markers"),
    "system_prompt": HereticLlmSetting("system_prompt"),
}
# What they do without being told, where ours is different and the scores depend on it.
DEFAULTS: dict[str, Any] = {"system_prompt": "You are a helpful assistant."}


def from_heretic(file: Path) -> str:
    """A config.toml of heretic-llm as one of ours, with a comment for what is not set here.

    Raises SettingsError where the file cannot be read, or a value cannot be ours either.
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
            notes.append(f"{name}: {(known.note if known else '') or 'no such setting here'}")
            continue
        ours[known.ours] = _converted(known, value)
        if known.note:
            notes.append(f"{name}: {known.note}")
    check_types(ours, str(file))
    return _text(ours, [f"Made from {file.name}, a file of heretic-llm.", *notes])


def _converted(known: HereticLlmSetting, value: Any) -> Any:
    try:
        return known.value(value)
    except (KeyError, TypeError):
        return value  # what is wrong with it is said when the whole is looked at


def _prompt_set(name: str, value: Mapping[str, Any], ours: dict[str, Any]) -> list[str]:
    """Put a prompt set under our name; returns what could not be. Raises SettingsError for what is no table."""
    if not isinstance(value, Mapping):
        raise SettingsError(
            f"'{name}' must be a table with a prompt set, not {type(value).__name__}.",
            where=name,
            fix=f"write it as a table: [{name}]",
        )
    for key, mine in PROMPT_KEYS.items():
        if key in value:
            ours[f"prompts.{PROMPT_SETS[name]}.{mine}"] = value[key]
    return [f"{name}.{key}: not taken over" for key in value if key not in PROMPT_KEYS]


def _text(ours: Mapping[str, Any], notes: list[str]) -> str:
    """As TOML: keys without a table first, then the tables."""
    lines = [f"# {plain_line(note)}" for note in notes]
    tables: dict[str, list[str]] = {}
    for key, value in ours.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {toml_value(value)}")
    for table in sorted(tables):
        lines += ["", f"[{table}]"] if table else [""]
        lines += tables[table]
    return "\n".join(lines) + "\n"
