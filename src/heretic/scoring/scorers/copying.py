"""Capability: repeating a list of words, made by a seeded generator."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from heretic.scoring.scorers.context import EncodedPrompts, ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Positive, Scorer

WORDS = [
    "apple", "river", "stone", "cloud", "green", "window", "paper", "garden", "silver", "bridge", "candle", "forest",
    "hammer", "island", "jacket", "kettle", "lemon", "mirror", "needle", "orange", "pencil", "rabbit", "saddle", "tunnel",
    "velvet", "winter", "yellow", "anchor", "basket", "copper",
]  # fmt: skip
LENGTHS = (4, 6, 8)  # words; longer lists are harder
ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Copying(Scorer):
    """Asks for a list of words, and compares the words of the answer with it."""

    tasks: Positive = 60
    seed: int = 0

    name = "copying"
    meaning = "share of `tasks` lists of four to eight words repeated exactly"
    unit = "share"
    better = "higher"

    def lists(self) -> list[list[str]]:
        """Return the lists of words."""
        source = random.Random(self.seed)
        return [source.sample(WORDS, LENGTHS[i % len(LENGTHS)]) for i in range(self.tasks)]

    def baseline(self, original: ScorerContext) -> EncodedPrompts:
        """Return the encoded requests."""
        asked = [f"Repeat these words exactly, and write nothing else: {' '.join(words)}" for words in self.lists()]
        return original.encode(self.name, asked)

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Count answers that contain the words in order, one after the other."""
        answers = model.texts(baseline, ANSWER_TOKENS)
        return Measurement.mean_of([float(copied(a, words)) for a, words in zip(answers, self.lists(), strict=True)])


def copied(answer: str, words: list[str]) -> bool:
    """Return whether the answer contains the list, in any case and with any separators."""
    found = re.findall(r"[a-z]+", answer.lower())
    return any(found[i : i + len(words)] == words for i in range(len(found) - len(words) + 1))
