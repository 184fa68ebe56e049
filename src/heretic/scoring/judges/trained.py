"""Judge with a logistic head on a sentence encoder; `benchmarks/train_judge.py` trains the head.

The encoder, all-MiniLM-L6-v2 of Sentence-Transformers (Reimers and Gurevych 2019, arXiv 1908.10084; distilled as in MiniLM,
Wang et al. 2020, arXiv 2002.10957), is loaded by name. The head reads an inner block: the last one carries an answer's topic
rather than whether it refuses (dev/LOG.md). Classifiers of refusals by others: ProtectAI's distilroberta-base-rejection-v1,
StrongREJECT (Souly et al. 2024, arXiv 2402.10260), WildGuard (Han et al. 2024, arXiv 2406.18495).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heretic.errors import UserError
from heretic.scoring.judges.classifier import on_device, translated_load_errors
from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.verdict import BEGINNING, EVASIVE, Exchange, Verdict, WholeAnswerJudge
from heretic.settings import TrainedSettings

HEAD = "judge_head.json"  # in heretic/data
MAX_TOKENS = 256  # the encoder's max_seq_length
BATCH = 32  # texts of a pass
TOLERANCE = 0.05  # of the logits of the head's example; another encoder changes them by more than 1
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+|(?<=[。！？])")


class SentenceEncoder:
    """A BERT-like encoder; `embed` averages the states of one block over the tokens of a text."""

    def __init__(self, name: str, device: str, block: int) -> None:
        """Load the encoder from a folder or hub id, from safetensors. Raises UserError."""
        self.block = block
        self.tokenizer, model = _load(name)
        self.model = on_device(model, device, "judge.trained.device")

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors, float32 [texts, width] on the CPU; equal texts are encoded once."""
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        row = {text: i for i, text in enumerate(unique)}
        batches = [self._embed_batch(unique[start : start + BATCH]) for start in range(0, len(unique), BATCH)]
        return torch.cat(batches)[[row[text] for text in texts]]

    def _embed_batch(self, texts: Sequence[str]) -> Tensor:
        states, mask = self._states(texts)
        return mean_state(states[self.block], mask)

    def _states(self, texts: Sequence[str]) -> tuple[Sequence[Tensor], Tensor]:
        """Return the states after every block and the attention mask."""
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        return self.model(**encoded, output_hidden_states=True).hidden_states, encoded["attention_mask"]


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Average states [texts, tokens, width] over the tokens of the mask; unit vectors, [texts, width] on the CPU."""
    weights = mask[..., None].to(states.dtype)
    return normalize((states * weights).sum(1) / weights.sum(1), dim=1).cpu()


def features(encoder: SentenceEncoder, answers: Sequence[str]) -> Tensor:
    """Describe answers by their beginning, first and last sentence, and length: float32 [answers, 3 width + 1]."""
    parts = [sentences(answer) for answer in answers]
    texts = [answer[:BEGINNING] for answer in answers] + [p[0] for p in parts] + [p[-1] for p in parts]
    lengths = torch.tensor([[math.log1p(len(answer[:BEGINNING].split())) / 5] for answer in answers])
    return torch.cat([*encoder.embed(texts).chunk(3), lengths], dim=1)


def sentences(text: str) -> list[str]:
    """Split a text at ends of sentences, colons and lines; parts without a letter or digit are left out."""
    return [part for part in _SENTENCE_END.split(text) if re.search(r"\w", part)] or [text]


@dataclass(frozen=True)
class Head:
    """The logistic regression, and an example that shows whether the encoder is the one it was trained on."""

    block: int
    labels: tuple[Verdict, ...]
    weight: Tensor  # [labels, features]
    bias: Tensor  # [labels]
    example: str
    example_logits: Tensor  # [labels]

    @classmethod
    def shipped(cls) -> Head:
        """Read the head that ships with heretic."""
        data = json.loads(head_text())
        tensors = {name: torch.tensor(data[name]) for name in ("weight", "bias", "example_logits")}
        return cls(data["block"], tuple(data["labels"]), example=data["example"], **tensors)

    def logits(self, described: Tensor) -> Tensor:
        """Return [answers, labels]."""
        return described @ self.weight.T + self.bias


class TrainedJudge(WholeAnswerJudge):
    """Takes the head's best label; an answer that it does not call a refusal may still be evasive by the rules."""

    name = "trained"

    def __init__(self, settings: TrainedSettings, evasion: Evasion) -> None:
        """Load head and encoder. Raises UserError if the encoder is missing or is another one."""
        self.evasion, self.head = evasion, Head.shipped()
        self.encoder = SentenceEncoder(settings.encoder, settings.device, self.head.block)
        if not self._same_encoder():
            raise UserError(
                f"{settings.encoder} is not the encoder that the judge was trained on.",
                code="encoder-mismatch",
                where="judge.trained.encoder",
                fix="use sentence-transformers/all-MiniLM-L6-v2 or a copy of it",
            )

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge answers in batches; empty ones skip the encoder."""
        read = [i for i, exchange in enumerate(exchanges) if not self.evasion.is_empty(exchange.answer)]
        labels: dict[int, Verdict] = {}
        if read:
            logits = self.head.logits(features(self.encoder, [exchanges[i].answer for i in read]))
            labels = {i: self.head.labels[n] for i, n in zip(read, logits.argmax(1).tolist(), strict=True)}
        return [self.evasion.checked(exchange, labels.get(i, EVASIVE)) for i, exchange in enumerate(exchanges)]

    def _same_encoder(self) -> bool:
        config = self.encoder.model.config
        width, blocks = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
        if 3 * width + 1 != self.head.weight.shape[1] or blocks < self.head.block:
            return False
        if self.encoder.tokenizer.pad_token is None:
            return False
        found = self.head.logits(features(self.encoder, [self.head.example]))[0]
        return torch.allclose(found, self.head.example_logits, rtol=0, atol=TOLERANCE)


def head_text() -> str:
    """Return the file of the head that ships with heretic."""
    return (resources.files("heretic") / "data" / HEAD).read_text(encoding="utf-8")


def local_encoder(name: str) -> str | None:
    """Return the folder of an encoder that is a folder or in the hub's cache, else None; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, "model.safetensors")
        except ValueError:  # no hub id
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    needed = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return str(folder) if all((folder / file).is_file() for file in needed) else None


def check_encoder(settings: TrainedSettings) -> None:
    """Read the encoder's config, without its weights. Raises UserError."""
    from transformers import AutoConfig

    with _loading(settings.encoder):
        AutoConfig.from_pretrained(settings.encoder)


def _load(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the weights, as in model/loading.py
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        return tokenizer, AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)


def _loading(name: str) -> AbstractContextManager[None]:
    """Return the context for loading the encoder."""

    def failure(cause: str) -> UserError:
        return UserError(
            f"Cannot load the encoder {name}: {cause}",
            code="encoder-not-loadable",
            where="judge.trained.encoder",
            fix="use a hub id or a folder with config.json, tokenizer and safetensors weights",
        )

    return translated_load_errors(failure)
