"""Refusals that must remain, such as those of harmful requests when over-refusals are what is ablated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heretic.errors import UserError
from heretic.scoring.scorers.borderline_refusals import BorderlineRefusals
from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.scorer import Measurement


@dataclass(frozen=True)
class KeptRefusals(BorderlineRefusals):
    """Measures how many of the original's refusals of a prompt set remain. Its options are those of the base class."""

    name = "kept_refusals"
    meaning = "share of the prompts of `source` that the original refuses or evades and the ablated model does, too"
    unit = "share"
    better = "higher"
    details = ("lost", "total")

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Look again at what the original refuses. Raises UserError if it refuses nothing."""
        prompts, before = baseline
        if not any(before):
            raise UserError(
                "The original refuses no prompt of this set, so there is nothing to keep.",
                code="nothing-refused",
                where=f"scorers.{self.name}.source",
                fix="choose requests that the model refuses",
            )
        now = self._unanswered(model, prompts)
        kept = [float(still) for refused, still in zip(before, now, strict=True) if refused]
        return Measurement.mean_of(kept, {"lost": kept.count(0.0), "total": float(len(kept))})
