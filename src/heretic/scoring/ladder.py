"""What a trial is worth, measured in the order of cost: divergence first, then refusals."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from heretic.model.batching import Batcher
from heretic.model.chat_format import ChatFormat
from heretic.model.loading import LanguageModel
from heretic.scoring.divergence import Divergence, measure_divergence
from heretic.scoring.refusals import MarkerJudge, RefusalCount, count_refusals


@dataclass(frozen=True)
class Scores:
    """Everything measured of one model: `refusals` of `total` harmful prompts, divergence on the harmless ones."""

    divergence: Divergence
    refusals: int
    total: int
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "divergence": self.divergence.as_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """What `as_dict` gave."""
        divergence = Divergence(**{k: float(v) for k, v in data["divergence"].items()})
        return cls(divergence, data["refusals"], data["total"], data["seconds"])


@dataclass(frozen=True)
class Ladder:
    """Measures the model as it is at the moment of the call, against the original's baseline."""

    language_model: LanguageModel
    chat: ChatFormat
    harmful: Sequence[list[int]]
    harmless: Sequence[list[int]]
    judge: MarkerJudge
    batcher: Batcher
    max_tokens: int

    def refusals(self, *, keep_answers: bool = False) -> RefusalCount:
        """Count refusals alone."""
        return count_refusals(
            self.language_model,
            self.chat,
            self.harmful,
            self.judge,
            self.batcher,
            self.max_tokens,
            keep_answers=keep_answers,
        )

    def score(self, baseline: Tensor, keep: Callable[[RefusalCount], None] | None = None) -> Scores:
        """Divergence from `baseline` [prompts, vocabulary] and refusals; `keep` receives the answers if given."""
        began = time.perf_counter()
        divergence = measure_divergence(self.language_model, self.harmless, baseline, self.batcher)
        between = time.perf_counter()
        counted = self.refusals(keep_answers=keep is not None)
        if keep is not None:
            keep(counted)
        seconds = {"divergence": between - began, "refusals": time.perf_counter() - between}
        return Scores(divergence, counted.count, counted.total, seconds)
