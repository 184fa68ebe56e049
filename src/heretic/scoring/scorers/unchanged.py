"""Answers to harmless prompts that begin exactly as the original's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Positive, Scorer


@dataclass(frozen=True)
class Unchanged(Scorer):
    """Compares greedy answers token by token."""

    tokens: Positive = 24

    name = "unchanged"
    meaning = "share of answers to `harmless_eval` whose first `tokens` tokens are the original's"
    unit = "share"
    better = "higher"

    def most_tokens(self, response: int) -> int:
        """Return the option."""
        return self.tokens

    def baseline(self, original: ScorerContext) -> list[list[int]]:
        """Return the original's answers."""
        return original.answers(original.harmless, self.tokens)

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Count equal answers."""
        answers = model.answers(model.harmless, self.tokens)
        return Measurement.mean_of([float(a == b) for a, b in zip(answers, baseline, strict=True)])
