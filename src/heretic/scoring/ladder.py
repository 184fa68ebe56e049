"""What a trial is worth, measured in the order of cost: divergence first, then refusals, and no further than it matters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from heretic.model.batching import AS_IT_IS, Batcher, Edited
from heretic.model.chat_format import ChatFormat
from heretic.model.entries import Entries
from heretic.model.loading import LanguageModel
from heretic.scoring.divergence import Divergence, measure_divergence
from heretic.scoring.race import Race, Requests, Standing, expected, leaning_of
from heretic.scoring.refusals import MarkerJudge, RefusalCount, count_refusals
from heretic.scoring.surrogate import Surrogate


@dataclass(frozen=True)
class Scores:
    """Everything measured of one model: `refusals` of `total` harmful prompts, divergence on the harmless ones.

    `seconds` are wall time by phase, shared out among the trials of a pass. `declined` has a 1 for every declined request.
    `leaning` is the sum, over the other requests, of the probability of the first words with which the original declined:
    how close these answers are to refusing; None where that was not measured.
    """

    divergence: Divergence
    refusals: int
    total: int
    seconds: dict[str, float]
    surrogate: Surrogate | None = None
    declined: str = ""
    leaning: float | None = None

    @property
    def expected(self) -> float:
        """Refusals, and those to expect if the first words were drawn by their probabilities; what the front is made of.

        A count alone cannot tell an answer that hardly declines any more from one that is about to, and the next prompts can.
        """
        return expected(self.refusals, self.leaning)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "divergence": self.divergence.as_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """What `as_dict` gave."""
        divergence = Divergence(**{k: float(v) for k, v in data["divergence"].items()})
        surrogate = Surrogate(**data["surrogate"]) if data.get("surrogate") else None
        seconds = dict(data["seconds"])
        bits, leaning = data.get("declined", ""), data.get("leaning")
        return cls(divergence, data["refusals"], data["total"], seconds, surrogate, bits, leaning)


@dataclass(frozen=True)
class Beaten:
    """What is known of a trial that was stopped since it could not reach the front any more: at least so many refusals, and
    so many to expect (`Scores.expected`)."""

    divergence: Divergence
    at_least: int
    total: int
    seconds: dict[str, float]
    surrogate: Surrogate
    expected_at_least: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "divergence": self.divergence.as_dict()}


Measured = Scores | Beaten


def never(_kl: float, _at_least: float) -> bool:
    """Nothing is beaten: everything is measured in full."""
    return False


@dataclass(frozen=True)
class Ladder:
    """Measures the model as it is at the moment of the call, against the original's baseline.

    `tried` is what the original said where it declined, by request; `entries` are what its blocks receive for the harmless
    prompts, and for the requests with the tried texts. Without them everything is measured too, at more cost.
    """

    language_model: LanguageModel
    chat: ChatFormat
    harmful: Sequence[list[int]]
    harmless: Sequence[list[int]]
    judge: MarkerJudge
    batcher: Batcher
    max_tokens: int
    tried: Sequence[list[int]] = ()
    harmless_entries: Entries | None = None
    harmful_entries: Entries | None = None

    def refusals(self, *, keep_answers: bool = False, fewest_tokens: int = 1) -> RefusalCount:
        """Count refusals alone, of one model; see `count_refusals`."""
        return count_refusals(
            self.language_model,
            self.chat,
            self.harmful,
            self.judge,
            self.batcher,
            self.max_tokens,
            keep_answers=keep_answers,
            fewest_tokens=fewest_tokens,
        )

    def score(self, baseline: Tensor, keep: Callable[[RefusalCount], None] | None = None) -> Scores:
        """Divergence from `baseline` [prompts, vocabulary] and refusals of one model; `keep` receives whole answers if given."""
        began = time.perf_counter()
        divergence = measure_divergence(self.language_model, self.harmless, baseline, self.batcher)[0]
        between = time.perf_counter()
        counted = self.refusals(keep_answers=keep is not None)
        if keep is not None:
            keep(counted)
        leaning = leaning_of(self.language_model, self._requests, counted.declined, self.batcher)
        seconds = {"divergence": between - began, "refusals": time.perf_counter() - between}
        return Scores(divergence, counted.count, counted.total, seconds, None, _bits(counted.declined), leaning)

    def score_trials(
        self, baseline: Tensor, edited: Edited = AS_IT_IS, beaten: Callable[[float, float], bool] = never
    ) -> list[Measured]:
        """Scores of every trial that shares the passes, as `score` gives them, but at less cost.

        A trial is left as soon as `beaten(its KL, refusals to expect at least)` is true.
        """
        began = time.perf_counter()
        found = measure_divergence(
            self.language_model, self.harmless, baseline, self.batcher, edited, self.harmless_entries
        )
        between = time.perf_counter()
        standings = Race(
            self.language_model,
            self.chat,
            self.judge,
            self.batcher,
            self.max_tokens,
            self._requests,
            edited,
            lambda trial, at_least: beaten(found[trial].mean, at_least),
        ).run()
        ended = time.perf_counter()
        seconds = {
            "divergence": (between - began) / edited.trials,
            "refusals": (ended - between) / edited.trials,
        }
        return [_measured(d, standing, seconds) for d, standing in zip(found, standings, strict=True)]

    @property
    def _requests(self) -> Requests:
        return Requests(self.harmful, self.tried or [[]] * len(self.harmful), self.harmful_entries)


def _measured(divergence: Divergence, standing: Standing, seconds: dict[str, float]) -> Measured:
    total, surrogate = len(standing.declined), standing.surrogate
    if standing.beaten:
        return Beaten(divergence, standing.at_least, total, dict(seconds), surrogate, standing.expected_at_least)
    bits = _bits([bool(d) for d in standing.declined])
    return Scores(divergence, standing.at_least, total, dict(seconds), surrogate, bits, standing.leaning)


def _bits(declined: Sequence[bool]) -> str:
    return "".join("1" if d else "0" for d in declined)
