"""Repetition in answers to harmless prompts."""

from __future__ import annotations

from typing import Any

from heretic.scoring.judges.evasion import repetition
from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Scorer


class Repetition(Scorer):
    """Counts the 4-grams of tokens that occurred before in the same answer."""

    name = "repetition"
    meaning = "mean share of repeated 4-grams of tokens in answers to `harmless_eval`"
    unit = "share"

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Average over the answers."""
        return Measurement.mean_of([repetition(answer) for answer in model.answers(model.harmless)])
