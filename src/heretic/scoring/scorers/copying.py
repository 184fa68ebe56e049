"""Capability: repeating a list of words, made by a seeded generator."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from heretic.scoring.scorers.tasks import TaskScorer

WORDS = [
    "apple", "river", "stone", "cloud", "green", "window", "paper", "garden", "silver", "bridge", "candle", "forest",
    "hammer", "island", "jacket", "kettle", "lemon", "mirror", "needle", "orange", "pencil", "rabbit", "saddle", "tunnel",
    "velvet", "winter", "yellow", "anchor", "basket", "copper",
]  # fmt: skip
LENGTHS = (4, 6, 8)  # words; longer lists are harder


@dataclass(frozen=True)
class Copying(TaskScorer):
    """Asks for a list of words, and compares the words of the answer with it."""

    name = "copying"
    meaning = "share of `tasks` lists of four to eight words repeated exactly"
    answer_tokens = 48

    def questions(self) -> list[tuple[str, list[str]]]:
        """Return requests with the lists of words."""
        source = random.Random(self.seed)
        lists = [source.sample(WORDS, LENGTHS[i % len(LENGTHS)]) for i in range(self.tasks)]
        return [(f"Repeat these words exactly, and write nothing else: {' '.join(words)}", words) for words in lists]

    def is_right(self, answer: str, wanted: list[str]) -> bool:
        """Look for the words in order, one after the other."""
        return copied(answer, wanted)


def copied(answer: str, words: list[str]) -> bool:
    """Return whether the answer contains the list, in any case and with any separators."""
    found = re.findall(r"[a-z]+", answer.lower())
    return any(found[i : i + len(words)] == words for i in range(len(found) - len(words) + 1))
