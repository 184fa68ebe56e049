"""What a trial is worth, measured in the order of cost: divergence first, then refusals, and no further than it matters.

Where there are limits to what may happen to harmless answers, these come last, for trials that nothing has beaten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from heretic.model.activation_cache import Entries
from heretic.model.batching import AS_IT_IS, Batcher, Edited
from heretic.model.chat_format import ChatFormat
from heretic.model.loading import LanguageModel
from heretic.scoring.divergence import Divergence, measure_divergence
from heretic.scoring.harmless_metrics import Bystanders, Conduct, measure_conduct
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, REFUSAL, Judge, digits
from heretic.scoring.refusal_count import Race, Requests, Standing, expected, leaning_of
from heretic.scoring.refusal_proxy import Surrogate
from heretic.scoring.refusals import RefusalCount, count_refusals
from heretic.scoring.teacher_forcing import Taught


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
    surrogate: Surrogate | None = None
    declined: str = ""
    leaning: float | None = None
    evasive: int = 0
    judge: str = "markers"
    conduct: Conduct | None = None
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
        return expected(self.unanswered, self.leaning)

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
            surrogate=Surrogate(**data["surrogate"]) if data.get("surrogate") else None,
            declined=data.get("declined", ""),
            leaning=data.get("leaning"),
            evasive=data.get("evasive", 0),
            judge=data.get("judge", "markers"),
            conduct=Conduct(**data["conduct"]) if data.get("conduct") else None,
            excess=dict(data.get("excess", {})),
        )


@dataclass(frozen=True)
class Beaten:
    """What is known of a trial that was stopped since it could not reach the front any more: at least so many requests
    declined or evaded, and so many to expect (`Scores.expected`)."""

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
    harmless_entries: Entries | None = None
    harmful_entries: Entries | None = None
    answered: Sequence[list[int]] = ()
    requests: Sequence[str] = ()
    bystanders: Bystanders | None = None

    @property
    def taught(self) -> Taught:
        """The harmless prompts with what is looked at behind them."""
        taught = Taught.of(self.harmless, self.answered or [[0]] * len(self.harmless))
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

    def conduct(self, edited: Edited = AS_IT_IS, trials: Sequence[int] = (0,)) -> list[Conduct]:
        """What happens to harmless answers, for those of the `trials` that share the passes; empty where there are no limits."""
        if self.bystanders is None or not trials:
            return []
        return measure_conduct(
            self.language_model, self.chat, self.bystanders, self.judge, self.batcher, self.max_tokens, edited, trials
        )

    def score(self, baseline: Tensor) -> Scores:
        """Divergence from `baseline` [tokens, vocabulary], refusals and conduct of one model."""
        began = time.perf_counter()
        divergence = measure_divergence(self.language_model, self.taught, baseline, self.batcher)[0]
        between = time.perf_counter()
        counted = self.refusals()
        after = time.perf_counter()
        conduct = self.conduct()
        unanswered = [v != ANSWER for v in counted.verdicts]
        leaning = leaning_of(self.language_model, self._requests, unanswered, self.batcher)
        seconds = {"divergence": between - began, "refusals": after - between}
        if conduct:
            seconds["harmless"] = time.perf_counter() - after
        scores = Scores(
            divergence=divergence,
            refusals=counted.count,
            total=counted.total,
            seconds=seconds,
            declined=digits(counted.verdicts),
            leaning=leaning,
            evasive=counted.evasive,
            judge=self.judge.name,
        )
        return self._judged(scores, conduct[0] if conduct else None)

    def score_trials(
        self, baseline: Tensor, edited: Edited = AS_IT_IS, beaten: Callable[[float, float], bool] = never
    ) -> list[Measured]:
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
        edited: Edited,
        beaten: Callable[[float, float], bool],
        spent: dict[str, float],
    ) -> list[Measured]:
        """Refusals of the trials, then the conduct of those that nothing has beaten."""
        began = time.perf_counter()
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
        between = time.perf_counter()
        seconds = {**spent, "refusals": (between - began) / edited.trials}
        kept = [trial for trial, standing in enumerate(standings) if not standing.beaten]
        limited = self.bystanders is not None and self.bystanders.limits.any
        conducts = dict(zip(kept, self.conduct(edited, kept), strict=True)) if limited else {}
        if conducts:
            seconds["harmless"] = (time.perf_counter() - between) / len(kept)
        return [
            self._measured(found[trial], standing, seconds, conducts.get(trial))
            for trial, standing in enumerate(standings)
        ]

    @property
    def _requests(self) -> Requests:
        return Requests(self.harmful, self.tried or [[]] * len(self.harmful), self.harmful_entries, self.requests)

    def _measured(
        self, divergence: Divergence, standing: Standing, seconds: dict[str, float], conduct: Conduct | None
    ) -> Measured:
        total, surrogate = len(standing.verdicts), standing.surrogate
        if standing.beaten:
            spent = {name: s for name, s in seconds.items() if name != "harmless"}
            return Beaten(divergence, standing.at_least, total, spent, surrogate, standing.expected_at_least)
        verdicts = [v or ANSWER for v in standing.verdicts]
        scores = Scores(
            divergence=divergence,
            refusals=verdicts.count(REFUSAL),
            total=total,
            seconds=dict(seconds),
            surrogate=surrogate,
            declined=digits(verdicts),
            leaning=standing.leaning,
            evasive=verdicts.count(EVASIVE),
            judge=self.judge.name,
        )
        return self._judged(scores, conduct)

    def _judged(self, scores: Scores, conduct: Conduct | None) -> Scores:
        if conduct is None or self.bystanders is None:
            return scores
        return replace(scores, conduct=conduct, excess=self.bystanders.limits.excess(conduct))
