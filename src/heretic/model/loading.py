"""Loading a model with its tokenizer, in the first number format that gives finite logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from heretic.errors import UserError, first_line
from heretic.model.anatomy import Anatomy, dissect, input_device
from heretic.model.batching import free_memory, out_of_memory
from heretic.model.checkpoint import Checkpoint
from heretic.model.device_errors import device_error, is_device_error
from heretic.model.quantisation import KEPT, QUANTISATIONS, keep_layout, loading_arguments, made_even
from heretic.model.tensor_info import OPENED
from heretic.model.unloading import unload
from heretic.progress import SILENT, Watcher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model, what it was loaded from, and what is known about its inside."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    anatomy: Anatomy
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
    def end_tokens(self) -> set[int]:
        """Token ids that end an answer."""
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = ends if isinstance(ends, list) else [ends]
        return {int(t) for t in (*listed, self.tokenizer.eos_token_id) if t is not None}


def load(
    checkpoint: Checkpoint,
    dtypes: Sequence[str],
    arguments: dict[str, Any],
    *,
    quantization: str = "none",
    trust_remote_code: list[str] | None = None,
    chat_template: str | None = "",
    watcher: Watcher = SILENT,
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
        words = dtype if quantization == "none" else f"{dtype}, quantised to {QUANTISATIONS[quantization].words}"
        if checkpoint.opened:
            words = f"{dtype}, opened from {checkpoint.opened}"
        with watcher.stage(f"Loading {checkpoint.model} as {words}", None):
            model = _weights(checkpoint, dtype, {**arguments, **fewer}, trusted)
        if _finite(model):
            # Numbers that were quantised to bfloat16 stay so.
            given = str(model.dtype).removeprefix("torch.") if checkpoint.quantised_by == KEPT else dtype
            return _checked(LanguageModel(model, tokenizer, checkpoint, dissect(model), given, quantization))
        watcher.warn(f"{checkpoint.model} gives logits that are not finite numbers in {dtype}.")
        unload(model)
    raise UserError(
        f"{checkpoint.model} gives logits that are not finite (NaN or infinite) in {', '.join(dict.fromkeys(dtypes))}.",
        where=str(checkpoint.folder),
        fix='the weights may be damaged; else try dtypes = ["float32"]',
    )


def _checked(loaded: LanguageModel) -> LanguageModel:
    """The same, if it is known where its answers end. Raises UserError."""
    try:
        _ = loaded.end_tokens
    except (TypeError, ValueError) as error:
        raise UserError(
            f"It cannot be read which tokens end an answer: {first_line(error)}",
            where=f"{loaded.checkpoint.folder / 'generation_config.json'}: eos_token_id",
        ) from None
    return loaded


def load_tokenizer(
    checkpoint: Checkpoint, trusted: bool = False, chat_template: str | None = ""
) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left, with a chat template: the model's own unless one is given. None: it need not have any."""
    extra = {"gguf_file": checkpoint.gguf_file} if checkpoint.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trusted, **extra)
    except Exception as error:  # its library raises plain Exceptions for what it cannot parse
        if out_of_memory(error):
            raise
        raise UserError(f"The tokenizer cannot be read: {first_line(error)}", where=str(checkpoint.folder)) from None
    tokenizer.padding_side = "left"
    if chat_template:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template and chat_template is not None:
        raise UserError(
            f"{checkpoint.model} has no chat template, so it is not known how to speak to it.",
            where=str(checkpoint.folder),
            fix='name a Jinja file: chat_template = "template.jinja"; or take the "instruct" version of the model',
        )
    return tokenizer


def _weights(checkpoint: Checkpoint, dtype: str, arguments: dict[str, Any], trusted: bool) -> PreTrainedModel:
    extra: dict[str, Any] = (
        {"gguf_file": checkpoint.gguf_file} if checkpoint.gguf_file else {"use_safetensors": not checkpoint.pickled}
    )
    known = type(checkpoint.config) in MODEL_FOR_CAUSAL_LM_MAPPING or trusted
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    try:
        loaded: Any = auto.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=trusted,
            output_loading_info=True,
            **arguments,
            **extra,
        )
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise UserError(
                "Out of memory while loading the model.",
                code="out-of-memory",
                fix="run heretic preflight: it names what fits and the line to set",
            ) from None
        if is_device_error(error):
            raise device_error(error) from error
        raise UserError(f"The model cannot be loaded: {first_line(error)}", where=str(checkpoint.folder)) from error
    except (OSError, ValueError, ImportError, TypeError, AttributeError, LookupError) as error:  # of its small files
        raise UserError(f"The model cannot be loaded: {first_line(error)}", where=str(checkpoint.folder)) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"The checkpoint lacks {len(missing)} of the model's tensors, such as {missing[0]}.",
            where=str(checkpoint.folder),
            fix="download the model again",
        )
    keep_layout(model)
    if checkpoint.quantised_by in OPENED:
        made_even(model, getattr(torch, dtype))
    if checkpoint.adapter is not None:
        model = _adapted(model, checkpoint.adapter)
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _adapted(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with a LoRA adapter in its modules, as peft puts it there: beside the weights, not in them."""
    from peft import PeftModel

    try:
        return cast(PreTrainedModel, PeftModel.from_pretrained(model, adapter).get_base_model())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_device_error(error):
            raise
        raise UserError(f"The adapter cannot be put on the model: {first_line(error)}", where=str(adapter)) from error


@torch.inference_mode()
def _finite(model: PreTrainedModel) -> bool:
    token = torch.tensor([[1]], device=input_device(model))
    try:
        return bool(torch.isfinite(model(input_ids=token, use_cache=False).logits).all())
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:  # of the model's code
        if out_of_memory(error):
            raise
        if is_device_error(error):
            raise device_error(error) from error
        raise UserError(
            f"{type(model).__name__} cannot be run on text alone: {first_line(error)}",
            fix="see docs/architectures.md for the architectures that work",
        ) from error
