"""Read a model's config.json, check it against the tensors, and open it with transformers."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic.errors import UserError, plain_line, shortened
from heretic.model.tensor_info import TensorInfo, quantization_method
from heretic.model.weight_files import LARGEST_CONFIG, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONTEXTS = ("max_position_embeddings", "n_positions")
BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head", "n_heads")
OTHER_SIZES = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner", "head_dim",
    "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mamba_n_heads", "mamba_d_head",
    "mamba_d_state", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "num_labels",
)  # fmt: skip
LARGEST_FOR_SMALL = 1 << 16  # a size that is always allowed, whatever the tensors' sizes
PACKING = 16  # numbers in one element of a packed tensor, at most twice over
MOST_ENTRIES = 300  # left out in turn to find the one that transformers rejects
DEEPEST = 4  # configs within configs
ATTENTION = (None, "eager", "sdpa")  # in PyTorch itself; the others need a package or kernels from the hub
EXPERTS = (None, "eager")
OTHER_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_small_files(folder: Path) -> dict[str, Any]:
    """Read config.json, and check that the other JSON files are readable. Raises UserError."""
    file = folder / "config.json"
    if not file.exists() and not file.is_symlink():
        adapter = (folder / "adapter_config.json").exists()
        raise UserError(
            f"{folder} is not a model folder: it has no config.json" + (", only an adapter." if adapter else "."),
            code="adapter-only" if adapter else "no-config",
            where=str(folder),
            fix="merge the adapter into its model (peft: merge_and_unload), or export the run again with --format full"
            if adapter
            else "name the folder that holds config.json",
        )
    for name in OTHER_FILES:
        if (folder / name).exists():
            read_json(folder / name, "damaged-model-file", LARGEST_CONFIG)
    return read_json(file, "invalid-config", LARGEST_CONFIG)


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], file: Path) -> None:
    """Raise UserError for sizes that contradict the tensors, before transformers allocates lists or modules."""
    widest = max((d for t in tensors.values() for d in t.shape), default=0)
    packed = any(t.is_packed for t in tensors.values())
    most = max(LARGEST_FOR_SMALL, widest * (PACKING if packed else 4))
    limits: dict[str, tuple[float, float]] = {
        **dict.fromkeys(BLOCKS, (1, len(tensors))),
        **dict.fromkeys(WIDTHS, (1, most)),
        **dict.fromkeys(OTHER_SIZES, (0, most)),
        **dict.fromkeys(CONTEXTS, (1, math.inf)),
    }
    for path, key, value in _sizes(config):
        low, high = limits.get(key, (-math.inf, math.inf))
        if low <= value <= high:
            continue
        what = f"must be at least {low}" if value < low else f"does not match the weights, which allow at most {high}"
        raise UserError(
            f"The size {path} is {_number(value)} and {what}.",
            code="config-size-mismatch",
            where=f"{file}: {path}",
            fix="use config.json from the repository of the weights",
        )


def _sizes(config: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, str, float]]:
    """Path, key and value of every number in a config, its nested configs and lists."""
    for key, value in config.items():
        here = f"{path}{plain_line(str(key))[:60]}"
        if isinstance(value, Mapping) and depth < DEEPEST:
            yield from _sizes(value, f"{here}.", depth + 1)
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield here, key, number if not (isinstance(number, float) and math.isnan(number)) else -1


def _number(value: float) -> str:
    return str(value) if abs(value) < 1e15 else "huge"


def open_config(folder: Path, raw: Mapping[str, Any], model: str, trusted: bool) -> PretrainedConfig:
    """Open the config with transformers, without machine-specific leftovers of a training tool. Raises UserError."""
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        config.get_text_config(decoder=True)
    except MemoryError:
        raise
    except Exception as error:  # config classes have their own checks, which raise any type
        raise _config_error(error, raw, file, model) from None
    check_decoder(config, file, trusted)
    for part in (config, config.get_text_config(decoder=True)):
        _forget_implementations(part)
        _forget_padding(part)
    return config


def _config_error(error: Exception, raw: Mapping[str, Any], file: Path, model: str) -> UserError:
    """The error for a config that transformers rejects, with the entries that it names."""
    text = str(error)
    if "trust_remote_code" in text:
        return UserError(
            f"{model} needs its own Python code to load.",
            code="needs-remote-code",
            where=str(file),
            fix=f'review that code, then set trust_remote_code = ["{model}"]',
        )
    kind = raw.get("model_type")
    if isinstance(kind, str) and "does not recognize this architecture" in text:
        return UserError(
            f"The installed transformers does not know model_type {plain_line(kind)[:80]!r}.",
            code="unknown-model-type",
            where=f"{file}: model_type",
            fix="update transformers",
        )
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or [type(error).__name__]
    # A strict dataclass names the field or its check in the first line, and puts the cause below.
    reason = lines[-1].partition("Error: ")[2] or lines[-1] if "alidation error" in lines[0] else lines[0]
    reason = plain_line(reason)[:250]
    keys = [key for key in raw if re.search(rf"\b{re.escape(str(key))}\b", text)]
    if isinstance(error, ZeroDivisionError):
        keys = [key for key, value in raw.items() if value == 0 and not isinstance(value, bool)]
    keys = keys or _culprits(raw)
    values = ", ".join(f"{plain_line(str(key))[:60]} = {shortened(repr(raw[key]))}" for key in keys[:3])
    return UserError(
        f"The model's config cannot be read: {reason}",
        code="invalid-config",
        where=f"{file}: {values}" if values else str(file),
        fix="correct the entry, or use config.json from the repository of the weights",
    )


def _culprits(raw: Mapping[str, Any]) -> list[str]:
    """The entry whose removal makes transformers accept a config, if its error names none."""
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return []
    for key in list(raw)[:MOST_ENTRIES]:
        with contextlib.suppress(Exception):  # this entry is not the cause
            CONFIG_MAPPING[kind].from_dict({k: v for k, v in raw.items() if k != key})
            return [key]
    return []


def auto_class(config: Any, trusted: bool) -> Any:
    """Return the auto class of transformers that loads the config's language model; None if there is none."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    own = _own_classes(config, trusted)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in own:
            return auto
    return None


def _own_classes(config: Any, trusted: bool) -> dict[str, str]:
    """Names of the model's own classes by transformers' auto class, if its code is trusted."""
    table = getattr(config, "auto_map", None) if trusted else None
    if not isinstance(table, dict):
        return {}
    return {auto: name.rpartition(".")[2] for auto, name in table.items() if isinstance(name, str)}


def check_decoder(config: Any, file: Path, trusted: bool) -> None:
    """Raise UserError unless the config is that of a decoder-only language model, before gigabytes are loaded."""
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"architectures must be a list of names, not {shortened(repr(names))}.",
            code="invalid-config",
            where=f"{file}: architectures",
            fix="use config.json from the repository of the weights",
        )
    own = _own_classes(config, trusted).get("AutoModelForCausalLM")
    other = bool(names) and all(name != own and _is_another_kind(name) for name in names)
    if getattr(config, "is_encoder_decoder", False) or other or auto_class(config, trusted) is None:
        raise UserError(
            f"{plain_line(names[0])[:100] if names else config.model_type} is not a decoder-only language model.",
            code="not-a-causal-model",
            where=f"{file}: architectures",
            fix="name a chat model that has a causal language model class in transformers or in its own code",
        )


def _is_another_kind(name: str) -> bool:
    """Whether transformers has a class of this name that is not a causal language model."""
    import transformers
    from transformers.models.auto import modeling_auto

    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    causal = {
        class_name
        for table in tables
        for value in table.values()
        for class_name in ([value] if isinstance(value, str) else value)
    }
    return name not in causal and name in dir(transformers)


def _forget_implementations(config: Any) -> None:
    """Let transformers choose kernels: a config names those of the machine that saved it."""
    if not _one_of(getattr(config, "_attn_implementation", None), ATTENTION):
        config._attn_implementation = None
    if not _one_of(getattr(config, "_experts_implementation", None), EXPERTS):
        config._experts_implementation = None


def _forget_padding(config: Any) -> None:
    """Drop a padding id outside the embedding, which PyTorch rejects. Padding is masked, so any id works."""
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows:
        config.pad_token_id = None


def _one_of(value: Any, allowed: tuple[str | None, ...]) -> bool:
    return value is None or (isinstance(value, str) and value in allowed)


def forget_left_over_quantization(config: Any, tensors: Mapping[str, TensorInfo], file: Path) -> str:
    """Remove a `quantization_config` from `config` if no tensor is packed.

    Returns:
        The method of the removed entry; empty if nothing was removed.

    Raises:
        UserError: Tensors are packed without an entry; transformers would use the packed numbers as weights.
    """
    method = quantization_method(config)
    packed = sorted(t.name for t in tensors.values() if t.is_packed)
    if method is None:
        undeclared = [n for n in packed if n.endswith(".weight") and tensors[n].dtype not in ("U8", "BOOL")]
        if undeclared:
            raise UserError(
                f"config.json has no quantization_config, but {plain_line(undeclared[0])[:100]} is {tensors[undeclared[0]].dtype}.",
                code="no-quantization-config",
                where=str(file),
                fix="use config.json from the repository of the weights",
            )
        return ""
    if packed or not tensors:
        return ""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return method
