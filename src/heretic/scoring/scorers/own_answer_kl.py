"""KL over the ablated model's own answers: damage that teacher forcing on the original's answers cannot show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Positive, Scorer


@dataclass(frozen=True)
class OwnAnswerKl(Scorer):
    """Compares both models while they read the answer of the measured one."""

    tokens: Positive = 16  # positions per answer

    name = "own_answer_kl"
    meaning = "`answer_kl` over the ablated model's own answers"
    unit = "nats"
    details = ("median", "p95", "max")
    needs_original = True

    def most_tokens(self, response: int) -> int:
        """Return the option."""
        return self.tokens

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Decode the model's answers and compute the divergence on them."""
        answers = (
            model.answers(model.harmless, self.tokens - 1) if self.tokens > 1 else [[]] * len(model.harmless.tokens)
        )
        return model.divergence(model.harmless.tokens, [[*answer, 0] for answer in answers])
