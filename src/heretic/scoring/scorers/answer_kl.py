"""KL over the first tokens of the original's answers to harmless prompts (teacher forcing)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Positive, Scorer


@dataclass(frozen=True)
class AnswerKl(Scorer):
    """Compares both models while they read the original's answer."""

    tokens: Positive = 16  # positions per answer

    name = "answer_kl"
    meaning = "`kl` over `tokens` tokens"
    unit = "nats"
    details = ("median", "p95", "max")
    needs_original = True

    def most_tokens(self, response: int) -> int:
        """Return the option."""
        return self.tokens

    def baseline(self, original: ScorerContext) -> list[list[int]]:
        """Return the original's answers, each followed by a placeholder for the next position."""
        if self.tokens == 1:
            return [[0] for _ in original.harmless.tokens]
        return [[*answer, 0] for answer in original.answers(original.harmless, self.tokens - 1)]

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Compute the divergence on the original's answers."""
        return model.divergence(model.harmless.tokens, baseline)
