"""The format `gguf`: one file, as llama.cpp and programs built on it read it, written with llama.cpp's own package.

Only what can be proven is written: the architectures whose tensors and settings transformers reads back from GGUF, and byte-level
BPE tokenizers that come back with the same ids. The written file is loaded and compared like every export.
Names of tensors are the gguf package's; what else a file holds is in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from heretic.ablation.operator import Operator
from heretic.errors import UserError
from heretic.export.gguf_tokenizer import Vocabulary, check_same, vocabulary
from heretic.export.job import Format, Order, Written
from heretic.export.save import TensorEdit, plan_edits
from heretic.export.spot_check import Columns, Rewritten, as_columns, rounding_of
from heretic.files import sha256
from heretic.model.checkpoint import Checkpoint, open_checkpoint
from heretic.model.loading import LanguageModel
from heretic.progress import Watcher
from heretic.settings import Settings
from heretic.stop import Stop

# By the setting: how matrices are stored, the file's type, and the mean KL that this rounding may add. Vectors are always float32.
KINDS: dict[str, tuple[Kind, gguf.LlamaFileType, float]] = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32, 0.0),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16, 1e-3),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16, 2e-3),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0, 1e-2),
}
FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
FROM_ELSEWHERE = "export the full model, then: python convert_hf_to_gguf.py FOLDER (it comes with llama.cpp)"


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys as llama.cpp rotates them: the two halves of every head's rows in turn."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _llama_layout(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    if ".q_proj." in name:
        return _interleaved(tensor, config.num_attention_heads)
    if ".k_proj." in name:
        return _interleaved(tensor, config.num_key_value_heads)
    return tensor


def _as_it_is(_name: str, tensor: torch.Tensor, _config: Any) -> torch.Tensor:
    return tensor


# By transformers' model type: the name in GGUF, how a tensor is laid out there, and the width of a head that a reader assumes
# (None: the stream's width divided by the heads).
Layout = Callable[[str, torch.Tensor, Any], torch.Tensor]
ARCHITECTURES: dict[str, tuple[str, Layout, int | None]] = {
    "llama": ("llama", _llama_layout, None),
    "mistral": ("llama", _llama_layout, None),
    "qwen2": ("qwen2", _as_it_is, None),
    "qwen3": ("qwen3", _as_it_is, 128),
}


@dataclass(frozen=True)
class Plan:
    """The edits by the checkpoint's names, the names in GGUF by the same, and the tokenizer."""

    edits: Mapping[str, TensorEdit]
    names: Mapping[str, str]
    vocabulary: Vocabulary


def prepare(model: LanguageModel, operators: Mapping[str, Operator], settings: Settings, watcher: Watcher) -> Plan:
    """Everything but the tensors. Raises UserError for an architecture or a tokenizer that this writer does not know."""
    checkpoint = model.checkpoint
    if checkpoint.gguf_file:
        raise _unknown("The base is a GGUF file itself, whose tensors were rounded once already", checkpoint)
    config: Any = checkpoint.config
    _check(config, checkpoint)
    names = _names(checkpoint, config)
    edits = plan_edits(checkpoint, model.anatomy.writers, operators, model.model)
    rows = next(checkpoint.tensors[n].shape[0] for n, g in names.items() if g == "token_embd.weight")
    return Plan(edits, names, vocabulary(model.tokenizer, rows, checkpoint))


def write(order: Order, folder: Path, watcher: Watcher, stop: Stop) -> Written:
    """The file, one tensor in memory at a time."""
    checkpoint, plan, config = order.checkpoint, order.prepared, order.checkpoint.config
    chosen = order.settings.gguf_type
    kind, file_type, rounding = KINDS[chosen]
    path = folder / f"{checkpoint.short_name}-{chosen}.gguf"
    architecture, layout, _ = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, config, checkpoint, file_type, order.settings.behaviour)
    plan.vocabulary.write(writer)
    for name, called in plan.names.items():
        shape = checkpoint.tensors[name].shape
        stored = _kind(shape, kind)
        bytes_ = int(np.prod(gguf.quants.quant_shape_to_byte_shape(shape, stored)))
        writer.add_tensor_info(called, shape, np.dtype(np.float32), bytes_, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with watcher.stage("Writing the GGUF file", len(plan.names)) as stage:
            for name in plan.names:
                stop.check()
                tensor = checkpoint.read(name)
                if name in plan.edits:
                    tensor = plan.edits[name](tensor.float())
                values = layout(name, tensor, config).float().contiguous().numpy()
                rounded = gguf.quants.quantize(values, _kind(values.shape, kind))
                if chosen == "f16" and not np.isfinite(rounded).all() and np.isfinite(values).all():
                    raise UserError(
                        f"{name} has numbers too large for float16.",
                        where='gguf_type = "f16"',
                        fix='gguf_type = "bf16"',
                    )
                writer.write_tensor_data(rounded)
                stage.advance()
    finally:
        writer.close()
    check_same(plan.vocabulary, checkpoint, path)
    with watcher.stage("Hashing", None):
        hashes = {
            "source": {file.name: sha256(file) for file in checkpoint.shards()},
            "written": {path.name: sha256(path)},
        }
    about = (
        "One GGUF file for [llama.cpp](https://github.com/ggml-org/llama.cpp) and programs built on it; matrices are stored as "
        f"`{chosen}`. The scores below are of this file, read back by transformers."
    )
    return Written(hashes, rounding=rounding, library="gguf", relation="quantized", about=about, facts={"type": chosen})


def open_written(order: Order, folder: Path) -> Checkpoint:
    """The written file, as any GGUF file is opened."""
    return open_checkpoint(str(next(folder.glob("*.gguf"))))


def rewritten(order: Order, folder: Path) -> Rewritten:
    """The written tensors, dequantised, by the checkpoint's names."""
    plan: Plan = order.prepared
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(next(folder.glob("*.gguf"))).tensors}

    @functools.lru_cache(maxsize=1)
    def whole(name: str) -> torch.Tensor:
        tensor = stored[plan.names[name]]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()  # what is mapped cannot be written to
        return torch.from_numpy(values).reshape(order.checkpoint.tensors[name].shape)

    def columns(name: str, where: Columns | None, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kind = stored[plan.names[name]].tensor_type
        found = as_columns(whole(name)) if where is None else where.of(whole(name))
        if kind in FLOATS:
            return found, rounding_of(expected, FLOATS[kind])
        return found, rounding_of_blocks(expected)

    return Rewritten(plan.edits, columns)


def rounding_of_blocks(expected: torch.Tensor) -> torch.Tensor:
    """How far q8_0 may be from numbers [blocks, numbers of a block]: half a step, and what is lost of the block's scale, which is
    rounded to float16, whose smallest numbers are 2^-24 apart."""
    step = expected.abs().amax(dim=1, keepdim=True) / 127
    return (0.5 * step + 127 * (step * 2**-11).clamp_min(2**-25)).expand_as(expected)


FORMAT = Format("one GGUF file for llama.cpp", prepare, write, open_written, rewritten=rewritten)


def _kind(shape: tuple[int, ...], wanted: Kind) -> Kind:
    """How a tensor of this shape is stored; rows that are not whole blocks of q8_0 stay float16."""
    if len(shape) == 1:
        return Kind.F32
    return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _check(config: Any, checkpoint: Checkpoint) -> None:
    """Raise UserError for what a reader would not be told, and so would compute in another way."""
    if config.model_type not in ARCHITECTURES:
        raise _unknown(f"{config.model_type} is not among {', '.join(ARCHITECTURES)}", checkpoint)
    rope = getattr(config, "rope_parameters", None) or {}
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    assumed = ARCHITECTURES[config.model_type][2] or width // heads
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    for wrong, what in (
        (rope.get("rope_type", "default") != "default", f"its positions are scaled ({rope.get('rope_type')})"),
        (head != assumed, f"its heads are {head} wide, not {assumed}"),
        (bool(windows), "its attention has a window"),
        (config.hidden_act != "silu", f"its activation is {config.hidden_act}"),
        (bool(getattr(config, "attention_bias", False)), "its attention has biases"),
        (bool(getattr(config, "mlp_bias", False)), "its MLPs have biases"),
    ):
        if wrong:
            raise _unknown(what, checkpoint)


def _names(checkpoint: Checkpoint, config: Any) -> dict[str, str]:
    """The names in GGUF of all tensors of the checkpoint that are written."""
    architecture = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == ARCHITECTURES[config.model_type][0])
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for name in checkpoint.tensors:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # stored all the same by some; the embedding is used
        called = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise _unknown(f"it has a tensor of no known name, {name}", checkpoint)
        names[name] = called
    return names


def _describe(
    writer: gguf.GGUFWriter, config: Any, checkpoint: Checkpoint, file_type: gguf.LlamaFileType, behaviour: str
) -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    writer.add_name(f"{checkpoint.short_name}, {behaviour or 'refusals'} ablated")
    reduced = f"A behaviour of this model, {behaviour}," if behaviour else "The safety training of this model"
    writer.add_description(f"{reduced} was reduced on purpose, with heretic.")
    writer.add_file_type(int(file_type))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)


def _unknown(what: str, checkpoint: Checkpoint) -> UserError:
    return UserError(
        f"This model cannot be written as GGUF by heretic: {what}.",
        where=str(checkpoint.folder),
        fix=FROM_ELSEWHERE,
    )
