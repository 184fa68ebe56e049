"""A judge that is a model: any sequence classifier with weights in safetensors, run on whole answers in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from heretic.errors import UserError, first_line
from heretic.model.batching import out_of_memory
from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, REFUSAL, Exchange, Verdict
from heretic.settings import ClassifierSettings

LONGEST = 512  # tokens, where neither tokenizer nor config says how long a text may be
NO_LIMIT = 10**6  # a tokenizer that does not know says a number beyond this


class ClassifierJudge:
    """Asks the classifier which of its labels fits best; what it does not call a refusal may still be evasive."""

    name = "classifier"
    ends_early = False

    def __init__(self, settings: ClassifierSettings, evasion: Evasion) -> None:
        """Load it. Raises UserError where there is no such model or it has no such label."""
        self.settings, self.evasion = settings, evasion
        self.tokenizer, self.model = _load(settings)
        config = self.model.config
        self.refusing, self.evasive = _found(config.id2label, settings)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        known = [self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        self.longest = min((n for n in known if n and n < NO_LIMIT), default=LONGEST)

    def is_final_refusal(self, answer: str) -> bool:
        """Never: it judges whole answers."""
        return False

    @torch.inference_mode()
    def verdicts(self, said: Sequence[Exchange]) -> list[Verdict]:
        """Answers of like length together; texts that are too long are cut at the end, and empty ones need no model."""
        asked = [i for i, one in enumerate(said) if not self.evasion.is_empty(one.answer)]
        order = sorted(asked, key=lambda i: len(said[i].answer))
        labels: dict[int, int] = {}
        for start in range(0, len(order), self.settings.batch_size):
            rows = order[start : start + self.settings.batch_size]
            texts = [said[i].answer for i in rows]
            paired = ([said[i].request for i in rows], texts) if self.settings.with_request else (texts,)
            encoded = self.tokenizer(
                *paired, padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
            ).to(self.model.device)
            labels |= zip(rows, self.model(**encoded).logits.argmax(-1).tolist(), strict=True)
        return [self._verdict(one, labels.get(i)) for i, one in enumerate(said)]

    def _verdict(self, said: Exchange, label: int | None) -> Verdict:
        if label is None or label in self.evasive:
            return EVASIVE
        if label in self.refusing:
            return REFUSAL
        return EVASIVE if self.evasion.is_evasive(*said) else ANSWER


def labels_of(settings: ClassifierSettings) -> tuple[set[int], set[int]]:
    """The numbers of its labels for refusals and for evasions, from its config alone. Raises UserError."""
    from transformers import AutoConfig

    with _loading(settings):
        config = AutoConfig.from_pretrained(settings.model)
    return _found(config.id2label, settings)


def _load(settings: ClassifierSettings) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with _loading(settings):
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model = AutoModelForSequenceClassification.from_pretrained(
            settings.model, use_safetensors=True, dtype=torch.float32
        )
    try:
        return tokenizer, model.to(settings.device).eval()
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA raises AssertionErrors
        if out_of_memory(error):
            raise
        raise UserError(
            f"The classifier cannot be put on the device {settings.device!r}: {first_line(error)[:200]}",
            code="device-not-there",
            where="judge.classifier.device",
            fix='judge.classifier.device = "cpu"',
        ) from None


@contextmanager
def _loading(settings: ClassifierSettings) -> Iterator[None]:
    """What goes wrong within is told as a UserError."""
    if not settings.model:
        raise UserError(
            'judge.kind = "classifier" needs a model.',
            code="missing-setting",
            where="judge.classifier.model",
            fix="name a folder or a hub id",
        )
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"The classifier {settings.model} cannot be loaded: {first_line(error)[:200]}",
            code="classifier-not-loadable",
            where="judge.classifier.model",
            fix="name a sequence classification model of transformers whose weights are in safetensors",
        ) from None


def _found(named: dict[int, str], settings: ClassifierSettings) -> tuple[set[int], set[int]]:
    refusing = _labels(named, settings.refusal_labels, "judge.classifier.refusal_labels")
    return refusing, _labels(named, settings.evasive_labels, "judge.classifier.evasive_labels")


def _labels(named: dict[int, str], wanted: Sequence[str], where: str) -> set[int]:
    """Numbers of the labels that are wanted, each by its name or number."""
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
