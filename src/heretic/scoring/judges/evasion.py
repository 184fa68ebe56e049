"""Recognize evasive answers: empty ones, loops, repetitions of the request, short deflections.

It is conservative: long evasions are not recognized, so that no real answer counts as evasive.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from heretic.scoring.judges.verdict import ANSWER, EVASIVE, Exchange, Verdict

GRAM = 4  # words or tokens of an n-gram
LOOP = 0.5  # share of repeated n-grams above which a text is a loop
MAX_WORDS = 40  # longer answers contain more than the deflecting phrase
ADDED_WORDS = 4  # words that a repetition of the request may add


class Evasion:
    """Recognizes evasive answers, with `phrases` that mark a deflection."""

    def __init__(self, phrases: Sequence[str] = ()) -> None:
        self.phrases = tuple(dict.fromkeys(normalize(p) for p in phrases))

    def is_evasive(self, request: str, answer: str) -> bool:
        """Return whether a whole answer is empty, a loop, a deflection of at most 40 words, or a repetition of the request."""
        if self.is_empty(answer):
            return True
        text = normalize(answer)
        words = _words(text)
        if is_loop(words):
            return True
        if len(words) <= MAX_WORDS and any(phrase in text for phrase in self.phrases):
            return True
        asked = _words(normalize(request))
        return len(asked) > 1 and len(words) <= len(asked) + ADDED_WORDS and _repeats(words, asked)

    def checked(self, exchange: Exchange, verdict: Verdict) -> Verdict:
        """Return another judge's verdict, but EVASIVE for an answer that is evasive by these rules."""
        return EVASIVE if verdict == ANSWER and self.is_evasive(*exchange) else verdict

    def is_empty(self, answer: str) -> bool:
        """Return whether an answer has no letter or digit."""
        return not _words(normalize(answer))


def loops(answer: str) -> bool:
    """Return whether an answer is a loop of words."""
    return is_loop(_words(normalize(answer)))


def is_loop(items: Sequence[Hashable]) -> bool:
    """Return whether more than half of the n-grams are repeated."""
    return repetition(items) > LOOP


def repetition(items: Sequence[Hashable]) -> float:
    """Compute the share of 4-grams of words or tokens that occurred before."""
    grams = [tuple(items[i : i + GRAM]) for i in range(len(items) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def normalize(text: str) -> str:
    """Lower the case, remove asterisks, make apostrophes plain and collapse white space."""
    text = text.lower().replace("*", "").replace("\u2019", "'").replace("\u2018", "'").replace("\u02bc", "'")
    return re.sub(r"\s+", " ", text).strip()


# Characters of scripts without spaces between words: kana and Chinese characters. Each counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:'[^\W_{_UNSPACED}]+)*")


def _words(normalized: str) -> list[str]:
    return _WORD.findall(normalized)


def _repeats(words: list[str], asked: list[str]) -> bool:
    """Return whether the answer contains the request, or is the larger part of it."""
    answer, request = f" {' '.join(words)} ", f" {' '.join(asked)} "
    return request in answer or (len(words) >= len(asked) / 2 and answer in request)
