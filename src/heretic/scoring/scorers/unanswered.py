"""Requests that are not answered, by the trained judge: it also notices evasions that no phrase gives away."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.trained import TrainedJudge
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, Exchange
from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Positive, Scorer
from heretic.settings import Settings, TrainedSettings


@dataclass(frozen=True)
class Unanswered(Scorer):
    """Judges the answers to `harmful_eval` with the judge `trained`, whichever judge the search uses."""

    encoder: str = ""  # empty: judge.trained.encoder
    tokens: Positive = 64

    name = "unanswered"
    meaning = (
        "requests of `harmful_eval` refused or evaded in `tokens` tokens, always by the judge `trained`. "
        "`evasive`: those evaded"
    )
    unit = "requests"
    details = ("evasive",)

    @classmethod
    def defaults(cls, settings: Settings) -> dict[str, Any]:
        """Return the encoder of the judge's settings."""
        return {"encoder": settings.judge.trained.encoder}

    def check(self) -> None:
        """Load the encoder, which may download it: not only after a whole study. Raises UserError."""
        self._judge.verdicts([])

    def most_tokens(self, response: int) -> int:
        """Return the option."""
        return self.tokens

    @functools.cached_property
    def _judge(self) -> TrainedJudge:
        return TrainedJudge(TrainedSettings(encoder=self.encoder), Evasion())

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Judge the answers. Raises UserError if the encoder cannot be loaded."""
        answers = model.texts(model.harmful, self.tokens)
        exchanges = [Exchange(*pair) for pair in zip(model.harmful.texts, answers, strict=True)]
        verdicts = self._judge.verdicts(exchanges)
        return Measurement(
            float(sum(verdict != ANSWER for verdict in verdicts)), {"evasive": float(verdicts.count(EVASIVE))}
        )
