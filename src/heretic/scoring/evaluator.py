"""What a trial is worth, measured in the order of cost: divergence first, then refusals, and no further than it matters.

Where there are limits to what may happen to harmless answers, these come last, for trials that nothing has beaten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from heretic.model.activation_cache import ActivationCache
from heretic.model.batching import UNEDITED, Batcher, EditSpec
from heretic.model.chat_format import ChatFormat
from heretic.model.loading import LanguageModel
from heretic.scoring.divergence import Divergence, measure_divergence
from heretic.scoring.harmless_metrics import HarmlessMetrics, HarmlessProbe, measure_conduct
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, REFUSAL, Judge, encode_verdicts
from heretic.scoring.refusal_count import (
    EncodedRequests,
    PrunedRefusalCounter,
    RefusalBounds,
    expected_refusals,
    refusal_mass_of,
)
from heretic.scoring.refusal_proxy import RefusalProxy
from heretic.scoring.refusals import RefusalCount, count_refusals
from heretic.scoring.teacher_forcing import TeacherForcedTexts


@dataclass(frozen=True)
class Scores:
    """Everything measured of one model: `refusals` of `total` harmful prompts, divergence on the harmless ones.

    `evasive` answers neither declined nor answered, and are not among the `refusals`. `declined` has a digit for every request:
    1 declined, 2 evasive, 0 answered; `judge` is the kind that said so. `leaning` is the sum, over the answered requests, of the
    probability of the first words with which the original declined: how close these answers are to refusing; None where that was
    not measured. `conduct` is what happened to harmless answers, and `excess` how far that is beyond each limit, where there are
    limits. `seconds` are wall time by phase, shared out among the trials of a pass.
    """

    divergence: Divergence
    refusals: int
    total: int
    seconds: dict[str, float]
    surrogate: RefusalProxy | None = None
    refused: str = ""
    leaning: float | None = None
    evasive: int = 0
    judge: str = "markers"
    harmless_metrics: HarmlessMetrics | None = None
    excess: dict[str, float] = field(default_factory=dict)

    @property
    def unanswered(self) -> int:
        """Refusals and evasions: an evasion is never taken for a success."""
        return self.refusals + self.evasive

    @property
    def within_limits(self) -> bool:
        """Whether every constraint is kept."""
        return all(excess <= 0 for excess in self.excess.values())

    @property
    def expected(self) -> float:
        """Unanswered requests, and those to expect if the first words were drawn by their probabilities; what the front is made of.

        A count alone cannot tell an answer that hardly declines any more from one that is about to, and the next prompts can.
        """
        return expected_refusals(self.unanswered, self.leaning)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "divergence": self.divergence.as_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """What `as_dict` gave, now or before the later fields were there."""
        return cls(
            divergence=Divergence.from_dict(data["divergence"]),
            refusals=data["refusals"],
            total=data["total"],
            seconds=dict(data["seconds"]),
            surrogate=RefusalProxy(**data["surrogate"]) if data.get("surrogate") else None,
            refused=data.get("refused", ""),
            leaning=data.get("leaning"),
            evasive=data.get("evasive", 0),
            judge=data.get("judge", "markers"),
            harmless_metrics=HarmlessMetrics(**data["harmless_metrics"]) if data.get("harmless_metrics") else None,
            excess=dict(data.get("excess", {})),
        )


@dataclass(frozen=True)
class PrunedTrial:
    """What is known of a trial that was stopped since it could not reach the front any more: at least so many requests
    declined or evaded, and so many to expect (`Scores.expected`)."""

    divergence: Divergence
    at_least: int
    total: int
    seconds: dict[str, float]
    surrogate: RefusalProxy
    expected_at_least: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "divergence": self.divergence.as_dict()}


TrialOutcome = Scores | PrunedTrial


def no_pruning(_kl: float, _at_least: float) -> bool:
    """Nothing is beaten: everything is measured in full."""
    return False


@dataclass(frozen=True)
class TrialEvaluator:
    """Measures the model as it is at the moment of the call, against the original's baseline.

    `tried` is what the original said where it declined, by request; `entries` are what its blocks receive for the harmless
    prompts, and for the requests with the tried texts. Without them everything is measured too, at more cost. `answered` are
    the first tokens of the original's answers to the harmless prompts, at which the divergence is taken (none: at the first).
    `requests` are the harmful prompts as texts, for judges that look at them. The answers to `bystanders` are looked at too: those
    of one model always, those of trials where there are limits.
    """

    language_model: LanguageModel
    chat: ChatFormat
    harmful: Sequence[list[int]]
    harmless: Sequence[list[int]]
    judge: Judge
    batcher: Batcher
    max_tokens: int
    tried: Sequence[list[int]] = ()
    harmless_entries: ActivationCache | None = None
    harmful_entries: ActivationCache | None = None
    reference_tokens: Sequence[list[int]] = ()
    requests: Sequence[str] = ()
    harmless_probe: HarmlessProbe | None = None

    @property
    def taught(self) -> TeacherForcedTexts:
        """The harmless prompts with what is looked at behind them."""
        taught = TeacherForcedTexts.of(self.harmless, self.reference_tokens or [[0]] * len(self.harmless))
        return replace(taught, entries=self.harmless_entries)

    def refusals(self, *, fewest_tokens: int = 1) -> RefusalCount:
        """Count refusals alone, of one model; see `count_refusals`."""
        return count_refusals(
            self.language_model,
            self.chat,
            self.harmful,
            self.judge,
            self.batcher,
            self.max_tokens,
            requests=self.requests,
            fewest_tokens=fewest_tokens,
        )

    def harmless_metrics(self, edited: EditSpec = UNEDITED, trials: Sequence[int] = (0,)) -> list[HarmlessMetrics]:
        """What happens to harmless answers, for those of the `trials` that share the passes; empty where there are no limits."""
        if self.harmless_probe is None or not trials:
            return []
        return measure_conduct(
            self.language_model,
            self.chat,
            self.harmless_probe,
            self.judge,
            self.batcher,
            self.max_tokens,
            edited,
            trials,
        )

    def score(self, baseline: Tensor) -> Scores:
        """Divergence from `baseline` [tokens, vocabulary], refusals and conduct of one model."""
        began = time.perf_counter()
        divergence = measure_divergence(self.language_model, self.taught, baseline, self.batcher)[0]
        between = time.perf_counter()
        counted = self.refusals()
        after = time.perf_counter()
        harmless_metrics = self.harmless_metrics()
        unanswered = [v != ANSWER for v in counted.verdicts]
        leaning = refusal_mass_of(self.language_model, self._requests, unanswered, self.batcher)
        seconds = {"divergence": between - began, "refusals": after - between}
        if harmless_metrics:
            seconds["harmless"] = time.perf_counter() - after
        scores = Scores(
            divergence=divergence,
            refusals=counted.count,
            total=counted.total,
            seconds=seconds,
            refused=encode_verdicts(counted.verdicts),
            leaning=leaning,
            evasive=counted.evasive,
            judge=self.judge.name,
        )
        return self._judged(scores, harmless_metrics[0] if harmless_metrics else None)

    def score_trials(
        self, baseline: Tensor, edited: EditSpec = UNEDITED, beaten: Callable[[float, float], bool] = no_pruning
    ) -> list[TrialOutcome]:
        """Scores of every trial that shares the passes, as `score` gives them, but at less cost.

        A trial is left as soon as `beaten(its KL, unanswered requests to expect at least)` is true.
        """
        began = time.perf_counter()
        found = measure_divergence(self.language_model, self.taught, baseline, self.batcher, edited)
        seconds = {"divergence": (time.perf_counter() - began) / edited.trials}
        return self._counted(found, edited, beaten, seconds)

    def _counted(
        self,
        found: Sequence[Divergence],
        edited: EditSpec,
        beaten: Callable[[float, float], bool],
        spent: dict[str, float],
    ) -> list[TrialOutcome]:
        """Refusals of the trials, then the conduct of those that nothing has beaten."""
        began = time.perf_counter()
        standings = PrunedRefusalCounter(
            self.language_model,
            self.chat,
            self.judge,
            self.batcher,
            self.max_tokens,
            self._requests,
            edited,
            lambda trial, at_least: beaten(found[trial].mean, at_least),
        ).run()
        between = time.perf_counter()
        seconds = {**spent, "refusals": (between - began) / edited.trials}
        kept = [trial for trial, summary in enumerate(standings) if not summary.beaten]
        limited = self.harmless_probe is not None and self.harmless_probe.limits.any
        conducts = dict(zip(kept, self.harmless_metrics(edited, kept), strict=True)) if limited else {}
        if conducts:
            seconds["harmless"] = (time.perf_counter() - between) / len(kept)
        return [
            self._measured(found[trial], summary, seconds, conducts.get(trial))
            for trial, summary in enumerate(standings)
        ]

    @property
    def _requests(self) -> EncodedRequests:
        return EncodedRequests(
            self.harmful, self.tried or [[]] * len(self.harmful), self.harmful_entries, self.requests
        )

    def _measured(
        self,
        divergence: Divergence,
        summary: RefusalBounds,
        seconds: dict[str, float],
        harmless_metrics: HarmlessMetrics | None,
    ) -> TrialOutcome:
        total, surrogate = len(summary.verdicts), summary.surrogate
        if summary.beaten:
            spent = {name: s for name, s in seconds.items() if name != "harmless"}
            return PrunedTrial(divergence, summary.at_least, total, spent, surrogate, summary.expected_at_least)
        verdicts = [v or ANSWER for v in summary.verdicts]
        scores = Scores(
            divergence=divergence,
            refusals=verdicts.count(REFUSAL),
            total=total,
            seconds=dict(seconds),
            surrogate=surrogate,
            refused=encode_verdicts(verdicts),
            leaning=summary.refusal_mass,
            evasive=verdicts.count(EVASIVE),
            judge=self.judge.name,
        )
        return self._judged(scores, harmless_metrics)

    def _judged(self, scores: Scores, harmless_metrics: HarmlessMetrics | None) -> Scores:
        if harmless_metrics is None or self.harmless_probe is None:
            return scores
        return replace(
            scores, harmless_metrics=harmless_metrics, excess=self.harmless_probe.limits.excess(harmless_metrics)
        )
