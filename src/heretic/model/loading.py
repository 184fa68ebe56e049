"""Load a model and its tokenizer, in the first dtype that gives finite logits."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from heretic.errors import UserError, first_line
from heretic.model.adapter import with_adapter
from heretic.model.architecture import ModelStructure, find_residual_writers, input_device
from heretic.model.batching import free_memory, out_of_memory
from heretic.model.checkpoint import Checkpoint
from heretic.model.config_reading import auto_class
from heretic.model.decoding_graph import DecodingGraphs
from heretic.model.device_errors import device_error, is_device_error
from heretic.model.quantization import BITSANDBYTES, QUANTIZATIONS, cast_unquantized, keep_layout, loading_arguments
from heretic.model.stages import share_inputs, stages_of
from heretic.model.template import PROCESS, template_beside, template_of
from heretic.model.tensor_info import DEQUANTIZED
from heretic.model.unloading import unload
from heretic.progress import NULL_REPORTER, ProgressReporter

if TYPE_CHECKING:
    from heretic.model.block_loading import BlockLoader

# Files that tokenizers are loaded from, in all families.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece*", "*.model", "*.tiktoken", "tekken.json", "*.spm")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with its tokenizer, its checkpoint and its structure."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    structure: ModelStructure
    dtype: str
    quantization: str = "none"
    loader: BlockLoader | None = None  # reads the blocks when they run; None: all are in memory
    graphs: DecodingGraphs = field(default_factory=DecodingGraphs)
    end_of_turn: int | None = None  # token that the chat template puts after an answer

    @property
    def device(self) -> torch.device:
        """The device of the token ids."""
        return input_device(self.model)

    @property
    def groups(self) -> int:
        """Batches that can be under way in turn: one for each GPU with blocks; 1 if a part of the model is in RAM."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        offloaded = any(p.device.type == "meta" for end in ends if end is not None for p in end.parameters())
        return 1 if offloaded else len(stages_of(self.structure.blocks))

    @property
    def context(self) -> int:
        """Largest number of tokens of prompt and answer."""
        return context_of(self.model.config)

    @property
    def window(self) -> int:
        """Tokens of the sliding attention window; unlimited for most models."""
        width = getattr(self.model.config.get_text_config(decoder=True), "sliding_window", None)
        return int(width) if width else 1 << 30

    @property
    def rows(self) -> int:
        """Rows of the embedding; token ids are below it."""
        embedding: Any = self.model.get_input_embeddings()
        return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])

    @property
    def end_tokens(self) -> set[int]:
        """Token ids that end an answer, without those outside the embedding."""
        config = self.model.generation_config
        return {
            i
            for i in (
                *ids_of(config.eos_token_id if config else None),
                *ids_of(self.tokenizer.eos_token_id),
                *ids_of(self.end_of_turn),
            )
            if 0 <= i < self.rows
        }

    @property
    def pad(self) -> int:
        """A valid token id for padding, which is masked: the tokenizer's own if it is inside the embedding."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            with contextlib.suppress(TypeError, ValueError):
                if valid := [i for i in ids_of(candidate) if 0 <= i < self.rows]:
                    return valid[0]
        return 0


def ids_of(value: Any) -> list[int]:
    """Parse token ids of a config: one, several or none, also as text. Raises TypeError and ValueError."""
    listed = value if isinstance(value, (list, tuple, set)) else [value]
    if any(isinstance(i, bool) or (isinstance(i, float) and i != int(i)) for i in listed):
        raise ValueError(f"{value!r} is not a token id")
    return [int(i) for i in listed if i is not None]


def load(
    checkpoint: Checkpoint,
    dtypes: Sequence[str],
    arguments: dict[str, Any],
    *,
    quantization: str = "none",
    trust_remote_code: list[str] | None = None,
    chat_template: str | None = "",
    readers: bool = False,
    reporter: ProgressReporter = NULL_REPORTER,
) -> LanguageModel:
    """Load a checkpoint's model and tokenizer.

    Args:
        checkpoint: What to load.
        dtypes: Tried in order ("bfloat16", …) until one token gives finite logits.
        arguments: device_map and max_memory for from_pretrained.
        quantization: The setting.
        trust_remote_code: Models whose own Python code may run.
        chat_template: Replaces the model's own unless empty; None: no template is required.
        readers: Whether the modules that read the stream are edited too.
        reporter: Receives progress and warnings.

    Raises:
        UserError: No dtype gives finite logits, memory runs out, or the model cannot be loaded.
    """
    free_memory()  # of an earlier model that failed after loading
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    trusted = checkpoint.model in (trust_remote_code or [])
    tokenizer = load_tokenizer(checkpoint, trusted, chat_template)
    damaged = ""
    for dtype in dict.fromkeys(dtypes):
        quantization_arguments = loading_arguments(quantization, getattr(torch, dtype), checkpoint)
        description = dtype if quantization == "none" else f"{dtype}, quantized to {QUANTIZATIONS[quantization].words}"
        if checkpoint.is_dequantized:
            description = f"{dtype}, dequantized from {checkpoint.is_dequantized}"
        with reporter.stage(f"Loading {checkpoint.model} as {description}", None):
            model = _load_weights(checkpoint, dtype, {**arguments, **quantization_arguments}, trusted)
        if _finite(model):
            # A bitsandbytes checkpoint keeps its own dtype.
            loaded_dtype = str(model.dtype).removeprefix("torch.") if checkpoint.quantized_by == BITSANDBYTES else dtype
            structure = find_residual_writers(model, readers=readers)
            share_inputs(structure.blocks)
            return with_end_tokens(LanguageModel(model, tokenizer, checkpoint, structure, loaded_dtype, quantization))
        reporter.warning(f"{checkpoint.model} gives logits that are not finite in {dtype}.")
        # Conversion to float16 can overflow, which is no damage.
        if dtype != "float16" or not any(t.dtype in ("BF16", "F32") for t in checkpoint.tensors.values()):
            parameters = model.named_parameters()
            damaged = next((name for name, p in parameters if not p.is_meta and not p.isfinite().all()), "")
        unload(model)
    raise UserError(
        f"{checkpoint.model} gives logits that are not finite (NaN or infinite) in {', '.join(dict.fromkeys(dtypes))}.",
        code="logits-not-finite",
        where=f"{checkpoint.folder}{f': {damaged} is not finite' if damaged else ''}",
        fix="download the weights again"
        if damaged or "float32" in dtypes
        else 'check the weights for damage, or try dtypes = ["float32"]',
    )


def context_of(config: Any) -> int:
    """Return the largest number of tokens of prompt and answer that a config allows."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else 1 << 30


def with_end_tokens(loaded: LanguageModel) -> LanguageModel:
    """Return the model if its end tokens are valid. Raises UserError."""
    try:
        _ = loaded.end_tokens
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"The tokens that end an answer cannot be read: {first_line(error)}",
            code="invalid-eos-token",
            where=f"{loaded.checkpoint.folder / 'generation_config.json'}: eos_token_id",
            fix="set the entry to a token id or a list of token ids",
        ) from None
    return loaded


def load_tokenizer(
    checkpoint: Checkpoint, trusted: bool = False, chat_template: str | None = ""
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, padding on the left. `chat_template` replaces its own; None: it may have none. Raises UserError."""
    extra = {"gguf_file": checkpoint.gguf_file} if checkpoint.gguf_file else {}
    if not extra and not trusted and not any(path for name in TOKENIZER_FILES for path in checkpoint.folder.glob(name)):
        # For some families transformers then creates a tokenizer without a vocabulary, which encodes nothing.
        raise UserError(
            f"{checkpoint.model} has no tokenizer.",
            code="no-tokenizer",
            where=str(checkpoint.folder),
            fix="add the model's tokenizer files there, for example tokenizer.json and tokenizer_config.json",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trusted, **extra)
    except BaseException as error:  # its library raises plain Exceptions and Rust panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if out_of_memory(error):
            raise
        file = checkpoint.folder / "tokenizer.json"
        raise UserError(
            f"The tokenizer cannot be read: {first_line(error)[:200]}",
            code="damaged-tokenizer",
            where=str(file if file.is_file() and not checkpoint.gguf_file else checkpoint.folder),
            fix="download the tokenizer's files again",
        ) from None
    tokenizer.padding_side = "left"
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template_beside(checkpoint.folder)
    if chat_template:
        tokenizer.chat_template = chat_template
    if chat_template is None:
        return tokenizer
    if not template_of(tokenizer).strip():
        raise UserError(
            f"{checkpoint.model} has no chat template.",
            code="no-chat-template",
            where=str(checkpoint.folder),
            fix='name a Jinja file: chat_template = "template.jinja"; or use the "instruct" version of the model',
        )
    PROCESS.start()  # it starts up while the weights load
    return tokenizer


def _load_weights(checkpoint: Checkpoint, dtype: str, arguments: dict[str, Any], trusted: bool) -> PreTrainedModel:
    extra: dict[str, Any] = (
        {"gguf_file": checkpoint.gguf_file}
        if checkpoint.gguf_file
        else {"use_safetensors": not checkpoint.pickled, "config": _config_with_weights_name(checkpoint)}
    )
    auto = auto_class(checkpoint.config, trusted)
    where = str(checkpoint.folder)
    if checkpoint.gguf_file:  # transformers' own switch does not reach this bar
        from transformers import modeling_gguf_pytorch_utils

        setattr(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors)  # noqa: B010  mypy knows its type
    try:
        loaded: Any = auto.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=trusted,
            output_loading_info=True,
            **arguments,
            **extra,
        )
    except Exception as error:  # any model's code runs here, so it raises any type
        if out_of_memory(error):
            raise UserError(
                "Out of memory while loading the model.",
                code="out-of-memory",
                fix="run heretic preflight, which shows the settings that fit",
            ) from None
        if is_device_error(error):
            raise device_error(error) from error
        raise UserError(
            f"The model cannot be loaded: {first_line(error)[:300]}",
            code="model-not-loadable",
            where=where,
            fix="compare config.json with that of the repository of the weights",
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"The checkpoint lacks {len(missing)} of the model's tensors, such as {missing[0]}.",
            code="missing-tensors",
            where=where,
            fix="download the model again",
        )
    keep_layout(model)
    if checkpoint.quantized_by in DEQUANTIZED:
        cast_unquantized(model, getattr(torch, dtype))
    if checkpoint.adapter is not None:
        model = with_adapter(model, checkpoint.adapter)
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _config_with_weights_name(checkpoint: Checkpoint) -> Any:
    """The config, naming the selected file of weights. Pickle files cannot be named; transformers uses the same order."""
    config = copy.deepcopy(checkpoint.config)
    if checkpoint.weights_name and not checkpoint.pickled:
        config.transformers_weights = checkpoint.weights_name
    return config


@torch.inference_mode()
def _finite(model: PreTrainedModel) -> bool:
    token = torch.tensor([[1]], device=input_device(model))
    try:
        return bool(torch.isfinite(model(input_ids=token, use_cache=False).logits).all())
    except Exception as error:  # any model's code runs here
        if out_of_memory(error):
            raise
        if is_device_error(error):
            raise device_error(error) from error
        raise UserError(
            f"{type(model).__name__} cannot run on text alone: {first_line(error)}",
            code="model-cannot-run",
            fix="see docs/architectures.md for the architectures that work",
        ) from error
