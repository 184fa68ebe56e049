"""Exact tasks made by a seeded generator: what the scorers of small capabilities share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from heretic.scoring.scorers.context import EncodedPrompts, ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Positive, Scorer


@dataclass(frozen=True)
class TaskScorer(Scorer):
    """Asks for answers that are known, and counts those that are right."""

    tasks: Positive = 60
    seed: int = 0

    unit = "share"
    has_own_prompts = True
    better = "higher"
    answer_tokens: ClassVar[int]

    def questions(self) -> list[tuple[str, Any]]:
        """Return the questions with their answers; equal for equal options."""
        raise NotImplementedError

    def is_right(self, answer: str, wanted: Any) -> bool:
        """Return whether an answer is the wanted one."""
        raise NotImplementedError

    def most_tokens(self, response: int) -> int:
        """Return the length of an answer to a task."""
        return self.answer_tokens

    def baseline(self, original: ScorerContext) -> EncodedPrompts:
        """Return the encoded questions."""
        return original.encode(self.name, [question for question, _ in self.questions()])

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Count right answers."""
        answers = model.texts(baseline, self.answer_tokens)
        pairs = zip(answers, self.questions(), strict=True)
        return Measurement.mean_of([float(self.is_right(answer, wanted)) for answer, (_, wanted) in pairs])
