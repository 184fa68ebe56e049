"""How many requests the model declines, judged by markers in the first tokens of its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from heretic.model.batching import Batch, Batcher
from heretic.model.chat_format import ChatFormat
from heretic.model.decoding import decode
from heretic.model.loading import LanguageModel


@dataclass(frozen=True)
class RefusalCount:
    """How many of `total` answers declined. `tokens` are the answers', up to the marker or, if `answers` were asked for, whole."""

    declined: tuple[bool, ...]
    tokens: tuple[tuple[int, ...], ...] = ()
    answers: tuple[str, ...] | None = None

    @property
    def count(self) -> int:
        """Number of refusals."""
        return sum(self.declined)

    @property
    def total(self) -> int:
        """Number of prompts."""
        return len(self.declined)


class MarkerJudge:
    """Decides by marker phrases whether an answer declines."""

    def __init__(self, markers: Sequence[str]) -> None:
        self.markers = tuple(dict.fromkeys(normalise(m) for m in markers))

    def declines(self, answer: str) -> bool:
        """Whether a finished answer declines; an empty one does."""
        text = normalise(answer)
        return not text or self.found_in(text)

    def found_in(self, normalised: str) -> bool:
        """Whether a normalised text holds a marker."""
        return any(marker in normalised for marker in self.markers)


def normalise(text: str) -> str:
    """Lower case, without asterisks, typographic apostrophes made plain, runs of space made one."""
    text = text.lower().replace("*", "").replace("\u2019", "'").replace("\u2018", "'").replace("\u02bc", "'")
    return re.sub(r"\s+", " ", text).strip()


def count_refusals(
    language_model: LanguageModel,
    chat: ChatFormat,
    sequences: Sequence[list[int]],
    judge: MarkerJudge,
    batcher: Batcher,
    max_tokens: int,
    *,
    keep_answers: bool = False,
    fewest_tokens: int = 1,
) -> RefusalCount:
    """Decode greedily and judge every answer.

    A row stops at its first marker, since nothing later can change the verdict, but not before it has `fewest_tokens`; with
    `keep_answers` all go on to the end.
    """

    def has_marker(_: int, tokens: list[int]) -> bool:
        return len(tokens) >= fewest_tokens and judge.found_in(normalise(chat.text(tokens)))

    def step(batch: Batch) -> list[list[int]]:
        ended = None if keep_answers else has_marker
        return decode(language_model.model, batch, max_tokens, language_model.end_tokens, ended)

    tokens = batcher.run("Refusals", sequences, step)
    answers = tuple(chat.text(t) for t in tokens)
    declined = tuple(judge.declines(answer) for answer in answers)
    return RefusalCount(declined, tuple(map(tuple, tokens)), answers if keep_answers else None)
