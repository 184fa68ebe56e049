"""Judge that runs a sequence classifier (safetensors weights) on whole answers in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from heretic.errors import UserError, first_line
from heretic.model.batching import out_of_memory
from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, REFUSAL, Exchange, Verdict, WholeAnswerJudge
from heretic.settings import ClassifierSettings

DEFAULT_MAX_LENGTH = 512  # tokens, if neither the tokenizer nor the config has a limit
NO_LIMIT = 10**6  # a tokenizer without a limit reports a larger number


class ClassifierJudge(WholeAnswerJudge):
    """Takes the classifier's best label; an answer that it does not call a refusal may still be evasive."""

    name = "classifier"

    def __init__(self, settings: ClassifierSettings, evasion: Evasion) -> None:
        """Load the classifier. Raises UserError if the model or one of its labels does not exist."""
        self.settings, self.evasion = settings, evasion
        self.tokenizer, self.model = _load(settings)
        config = self.model.config
        self.refusing, self.evasive = _label_ids(config.id2label, settings)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        known = [self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        self.max_length = min((n for n in known if n and n < NO_LIMIT), default=DEFAULT_MAX_LENGTH)

    @torch.inference_mode()
    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge answers in batches of similar length; long texts are truncated, empty ones skip the model."""
        nonempty = [i for i, exchange in enumerate(exchanges) if not self.evasion.is_empty(exchange.answer)]
        order = sorted(nonempty, key=lambda i: len(exchanges[i].answer))
        labels: dict[int, int] = {}
        for start in range(0, len(order), self.settings.batch_size):
            rows = order[start : start + self.settings.batch_size]
            texts = [exchanges[i].answer for i in rows]
            paired = ([exchanges[i].request for i in rows], texts) if self.settings.with_request else (texts,)
            encoded = self.tokenizer(
                *paired, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.model.device)
            labels |= zip(rows, self.model(**encoded).logits.argmax(-1).tolist(), strict=True)
        return [self._verdict(exchange, labels.get(i)) for i, exchange in enumerate(exchanges)]

    def _verdict(self, exchange: Exchange, label: int | None) -> Verdict:
        if label is None or label in self.evasive:
            return EVASIVE
        if label in self.refusing:
            return REFUSAL
        return self.evasion.checked(exchange, ANSWER)


def labels_of(settings: ClassifierSettings) -> tuple[set[int], set[int]]:
    """Return the ids of the refusal and evasion labels, read from the config alone. Raises UserError."""
    from transformers import AutoConfig

    with _loading(settings):
        config = AutoConfig.from_pretrained(settings.model)
    return _label_ids(config.id2label, settings)


def _load(settings: ClassifierSettings) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with _loading(settings):
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model = AutoModelForSequenceClassification.from_pretrained(
            settings.model, use_safetensors=True, dtype=torch.float32
        )
    return tokenizer, on_device(model, settings.device, "judge.classifier.device")


def on_device(model: Any, device: str, where: str) -> Any:
    """Move a judge's model to the device that the setting `where` names. Raises UserError."""
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # PyTorch without this accelerator raises AssertionError
        if out_of_memory(error):
            raise
        raise UserError(
            f"Cannot move the judge's model to device {device!r}: {first_line(error)[:200]}",
            code="device-not-there",
            where=where,
            fix=f'{where} = "cpu"',
        ) from None


@contextmanager
def translated_load_errors(failure: Callable[[str], UserError]) -> Iterator[None]:
    """Translate what loading a judge's model raises within the context into `failure` of its first line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        if out_of_memory(error):
            raise
        raise failure(first_line(error)[:200]) from None


def _loading(settings: ClassifierSettings) -> AbstractContextManager[None]:
    """Return the context for loading the classifier. Raises UserError if the settings name none."""
    if not settings.model:
        raise UserError(
            'judge.kind = "classifier" requires judge.classifier.model.',
            code="missing-setting",
            where="judge.classifier.model",
            fix="set it to a folder or a hub id",
        )

    def failure(cause: str) -> UserError:
        return UserError(
            f"Cannot load the classifier {settings.model}: {cause}",
            code="classifier-not-loadable",
            where="judge.classifier.model",
            fix="use a transformers sequence classification model with safetensors weights",
        )

    return translated_load_errors(failure)


def _label_ids(named: dict[int, str], settings: ClassifierSettings) -> tuple[set[int], set[int]]:
    refusing = _labels(named, settings.refusal_labels, "judge.classifier.refusal_labels")
    return refusing, _labels(named, settings.evasive_labels, "judge.classifier.evasive_labels")


def _labels(named: dict[int, str], wanted: Sequence[str], where: str) -> set[int]:
    """Return the ids of the wanted labels, each given by name or id."""
    by_name = {**{str(i): int(i) for i in named}, **{name.lower(): int(i) for i, name in named.items()}}
    missing = [w for w in wanted if w.lower() not in by_name]
    if missing:
        raise UserError(
            f"The classifier has no label '{missing[0]}'.",
            code="unknown-label",
            where=where,
            fix=f"use one of: {', '.join(named.values())}",
        )
    return {by_name[w.lower()] for w in wanted}
