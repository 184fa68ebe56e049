"""Loading a model with its tokenizer, in the first number format that gives finite logits."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from heretic.errors import UserError, first_line, plain_line
from heretic.model.architecture import ModelStructure, find_residual_writers, input_device
from heretic.model.batching import free_memory, out_of_memory
from heretic.model.checkpoint import Checkpoint
from heretic.model.config_reading import auto_class
from heretic.model.device_errors import device_error, is_device_error
from heretic.model.quantization import KEPT, QUANTIZATIONS, balanced_4bit, keep_layout, loading_arguments
from heretic.model.template import PROCESS, template_of
from heretic.model.tensor_info import OPENED
from heretic.model.unloading import unload
from heretic.progress import NULL_REPORTER, ProgressReporter

# What tokenizers are read from, in all families.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece*", "*.model", "*.tiktoken", "tekken.json", "*.spm")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model, what it was loaded from, and what is known about its inside."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    structure: ModelStructure
    dtype: str
    quantization: str = "none"

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return input_device(self.model)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(limit) if limit else 1 << 30

    @property
    def window(self) -> int:
        """Tokens that the narrowest attention looks back over; unlimited for most models."""
        width = getattr(self.model.config.get_text_config(decoder=True), "sliding_window", None)
        return int(width) if width else 1 << 30

    @property
    def rows(self) -> int:
        """Rows of the embedding: the token ids that the model knows are below it."""
        embedding: Any = self.model.get_input_embeddings()
        return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])

    @property
    def end_tokens(self) -> set[int]:
        """Token ids that end an answer; those that the model cannot say are left out."""
        config = self.model.generation_config
        return {
            i
            for i in (*ids_of(config.eos_token_id if config else None), *ids_of(self.tokenizer.eos_token_id))
            if 0 <= i < self.rows
        }

    @property
    def pad(self) -> int:
        """A token id that the model knows, for padding, which is masked: the tokenizer's own if it will do."""
        for given in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            with contextlib.suppress(TypeError, ValueError):
                if known := [i for i in ids_of(given) if 0 <= i < self.rows]:
                    return known[0]
        return 0


def ids_of(given: Any) -> list[int]:
    """Token ids as configurations hold them: one, several, none, also as text. Raises TypeError and ValueError for what is none."""
    listed = given if isinstance(given, (list, tuple, set)) else [given]
    if any(isinstance(i, bool) or (isinstance(i, float) and i != int(i)) for i in listed):
        raise ValueError(f"{given!r} is no token id")
    return [int(i) for i in listed if i is not None]


def load(
    checkpoint: Checkpoint,
    dtypes: Sequence[str],
    arguments: dict[str, Any],
    *,
    quantization: str = "none",
    trust_remote_code: list[str] | None = None,
    chat_template: str | None = "",
    reporter: ProgressReporter = NULL_REPORTER,
) -> LanguageModel:
    """Load `checkpoint`; `arguments` are device_map and max_memory as from_pretrained takes them, `quantization` is the setting.

    `dtypes` are tried in turn ("bfloat16", …) until one token gives finite logits. Raises UserError when none does, when
    memory runs out, or when the model's code would have to be trusted.
    """
    free_memory()  # of an earlier model that failed between loading and its first use
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    trusted = checkpoint.model in (trust_remote_code or [])
    tokenizer = load_tokenizer(checkpoint, trusted, chat_template)
    for dtype in dict.fromkeys(dtypes):
        fewer = loading_arguments(quantization, getattr(torch, dtype), checkpoint)
        words = dtype if quantization == "none" else f"{dtype}, quantized to {QUANTIZATIONS[quantization].words}"
        if checkpoint.is_dequantized:
            words = f"{dtype}, opened from {checkpoint.is_dequantized}"
        with reporter.stage(f"Loading {checkpoint.model} as {words}", None):
            model = _weights(checkpoint, dtype, {**arguments, **fewer}, trusted)
        if _finite(model):
            # Numbers that were quantized to bfloat16 stay so.
            given = str(model.dtype).removeprefix("torch.") if checkpoint.quantized_by == KEPT else dtype
            return _checked(
                LanguageModel(model, tokenizer, checkpoint, find_residual_writers(model), given, quantization)
            )
        reporter.warning(f"{checkpoint.model} gives logits that are not finite numbers in {dtype}.")
        unload(model)
    raise UserError(
        f"{checkpoint.model} gives logits that are not finite (NaN or infinite) in {', '.join(dict.fromkeys(dtypes))}.",
        code="logits-not-finite",
        where=str(checkpoint.folder),
        fix='the weights may be damaged; else try dtypes = ["float32"]',
    )


def _checked(loaded: LanguageModel) -> LanguageModel:
    """The same, if it is known where its answers end. Raises UserError."""
    try:
        _ = loaded.end_tokens
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"It cannot be read which tokens end an answer: {first_line(error)}",
            code="invalid-eos-token",
            where=f"{loaded.checkpoint.folder / 'generation_config.json'}: eos_token_id",
            fix="correct the entry: a token id, or a list of them",
        ) from None
    return loaded


def load_tokenizer(
    checkpoint: Checkpoint, trusted: bool = False, chat_template: str | None = ""
) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left, with a chat template: the model's own unless one is given. None: it need not have any."""
    extra = {"gguf_file": checkpoint.gguf_file} if checkpoint.gguf_file else {}
    if not extra and not trusted and not any(path for name in TOKENIZER_FILES for path in checkpoint.folder.glob(name)):
        # Of some families transformers makes a tokenizer without words then, which encodes everything to nothing.
        raise UserError(
            f"{checkpoint.model} has no tokenizer.",
            code="no-tokenizer",
            where=str(checkpoint.folder),
            fix="put the model's tokenizer files there, such as tokenizer.json and tokenizer_config.json",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trusted, **extra)
    except BaseException as error:  # its library raises plain Exceptions for what it cannot parse, and panics of Rust
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if out_of_memory(error):
            raise
        file = checkpoint.folder / "tokenizer.json"
        raise UserError(
            f"The tokenizer cannot be read: {plain_line(first_line(error))[:200]}",
            code="damaged-tokenizer",
            where=str(file if file.is_file() and not checkpoint.gguf_file else checkpoint.folder),
            fix="download the tokenizer's files again",
        ) from None
    tokenizer.padding_side = "left"
    if chat_template:
        tokenizer.chat_template = chat_template
    if chat_template is None:
        return tokenizer
    if not template_of(tokenizer).strip():
        raise UserError(
            f"{checkpoint.model} has no chat template.",
            code="no-chat-template",
            where=str(checkpoint.folder),
            fix='name a Jinja file: chat_template = "template.jinja"; or take the "instruct" version of the model',
        )
    PROCESS.start()  # it becomes ready while the weights are loaded
    return tokenizer


def _weights(checkpoint: Checkpoint, dtype: str, arguments: dict[str, Any], trusted: bool) -> PreTrainedModel:
    extra: dict[str, Any] = (
        {"gguf_file": checkpoint.gguf_file}
        if checkpoint.gguf_file
        else {"use_safetensors": not checkpoint.pickled, "config": _told_its_file(checkpoint)}
    )
    auto = auto_class(checkpoint.config, trusted)
    where = str(checkpoint.folder)
    try:
        loaded: Any = auto.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=trusted,
            output_loading_info=True,
            **arguments,
            **extra,
        )
    except Exception as error:  # any model's code runs here, so anything may come out of it
        if out_of_memory(error):
            raise UserError(
                "Out of memory while loading the model.",
                code="out-of-memory",
                fix="run heretic preflight: it names what fits and the line to set",
            ) from None
        if is_device_error(error):
            raise device_error(error) from error
        raise UserError(
            f"The model cannot be loaded: {plain_line(first_line(error))[:300]}",
            code="model-not-loadable",
            where=where,
            fix="compare config.json with that of the repository that the weights are from",
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
    if checkpoint.quantized_by in OPENED:
        balanced_4bit(model, getattr(torch, dtype))
    if checkpoint.adapter is not None:
        model = _adapted(model, checkpoint.adapter)
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _told_its_file(checkpoint: Checkpoint) -> Any:
    """The config with the file of weights that was chosen; pickle files cannot be named, and are found in the same order."""
    config = copy.deepcopy(checkpoint.config)
    if checkpoint.weights_name and not checkpoint.pickled:
        config.transformers_weights = checkpoint.weights_name
    return config


def _adapted(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with a LoRA adapter in its modules, as peft puts it there: beside the weights, not in them."""
    from peft import PeftModel

    try:
        return cast(PreTrainedModel, PeftModel.from_pretrained(model, adapter).get_base_model())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_device_error(error):
            raise
        raise UserError(
            f"The adapter cannot be put on the model: {first_line(error)}",
            code="adapter-not-loadable",
            where=str(adapter),
            fix="name the model that the adapter was made for",
        ) from error


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
            f"{type(model).__name__} cannot be run on text alone: {first_line(error)}",
            code="model-cannot-run",
            fix="see docs/architectures.md for the architectures that work",
        ) from error
