"""Capability: sums, differences and products of small numbers, made by a seeded generator."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from heretic.scoring.scorers.tasks import TaskScorer


@dataclass(frozen=True)
class Arithmetic(TaskScorer):
    """Asks for a number, and compares the last one of the answer's first sentence with it."""

    name = "arithmetic"
    meaning = "share of `tasks` sums, differences and products answered exactly"
    answer_tokens = 24

    def questions(self) -> list[tuple[str, int]]:
        """Return questions with their answers."""
        source = random.Random(self.seed)
        made = []
        for i in range(self.tasks):
            a, b = source.randint(2, 99), source.randint(2, 99)
            if i % 3 == 2:
                a, b = a % 12 + 2, b % 12 + 2
            sign, value = (("+", a + b), ("-", a - b), ("*", a * b))[i % 3]
            made.append((f"What is {a} {sign} {b}? Reply with the number only.", value))
        return made

    def is_right(self, answer: str, wanted: int) -> bool:
        """Compare the number."""
        return number_in(answer) == wanted


def number_in(answer: str) -> int | None:
    """Return the last integer of the first line that has one (an answer may repeat the question); None without any."""
    for line in answer.splitlines():
        numbers = re.findall(r"(?<![\w.])-?\d+(?![\w.]*\d)", line.replace(",", "").replace("\u2212", "-"))
        if numbers:
            return int(numbers[-1])
    return None
