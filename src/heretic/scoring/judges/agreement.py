"""Agreement of a judge with short answers labeled by hand.

The set ships with heretic and covers harmless topics only. It is made of hard cases: polite refusals, answers that contain
"sorry" or "illegal", evasions without a marker. It shows which errors a judge makes, not how often it makes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from heretic.files import split_lines
from heretic.scoring.interval import wilson
from heretic.scoring.judges.verdict import ORDER, REFUSAL, Exchange, Judge, Verdict


@dataclass(frozen=True)
class LabeledAnswer:
    """A request with its answer, and the label given by a person."""

    exchange: Exchange
    label: Verdict


@dataclass(frozen=True)
class Fraction:
    """A proportion, `part` of `whole`."""

    part: int
    whole: int

    @property
    def value(self) -> float:
        """The proportion; NaN if `whole` is 0."""
        return self.part / self.whole if self.whole else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval (Wilson)."""
        return wilson(self.part, self.whole)

    def __str__(self) -> str:
        """Format the proportion with its interval."""
        low, high = self.interval
        return f"{self.value:.0%} ({self.part} of {self.whole}; 95 % interval {low:.0%} to {high:.0%})"


@dataclass(frozen=True)
class Agreement:
    """Confusion matrix of a judge on labeled answers."""

    judge: str
    counts: dict[tuple[Verdict, Verdict], int]  # by (label, verdict)

    @property
    def agreement(self) -> Fraction:
        """Fraction of answers on which judge and label agree."""
        equal = sum(n for (label, verdict), n in self.counts.items() if label == verdict)
        return Fraction(equal, sum(self.counts.values()))

    @property
    def precision(self) -> Fraction:
        """Fraction of the judge's refusals that are labeled refusal."""
        judged = sum(n for (_, verdict), n in self.counts.items() if verdict == REFUSAL)
        return Fraction(self.counts.get((REFUSAL, REFUSAL), 0), judged)

    @property
    def recall(self) -> Fraction:
        """Fraction of the labeled refusals that the judge recognizes."""
        labeled = sum(n for (label, _), n in self.counts.items() if label == REFUSAL)
        return Fraction(self.counts.get((REFUSAL, REFUSAL), 0), labeled)

    def as_dict(self) -> dict[str, Any]:
        """Return the data that --json prints."""
        shares = {"agreement": self.agreement, "precision": self.precision, "recall": self.recall}
        table = {label: {verdict: self.counts.get((label, verdict), 0) for verdict in ORDER} for label in ORDER}
        numbers = {
            name: {"value": s.value if s.whole else None, "of": s.whole, "interval": s.interval}
            for name, s in shares.items()
        }
        return {"judge": self.judge, **numbers, "labeled_and_judged": table}

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of the table on the screen."""
        shown = [
            ("judge", self.judge),
            ("agreement", str(self.agreement)),
            ("precision of refusals", str(self.precision)),
            ("recall of refusals", str(self.recall)),
        ]
        for label in ORDER:
            judged = ", ".join(f"{self.counts.get((label, verdict), 0)} {verdict}" for verdict in ORDER)
            shown.append((f"labeled {label}", f"judged {judged}"))
        return shown


def labeled_answers() -> list[LabeledAnswer]:
    """Load the labeled answers that ship with heretic."""
    file = resources.files("heretic") / "scoring" / "judges" / "labeled_answers.jsonl"
    rows = [json.loads(line) for line in split_lines(file.read_text(encoding="utf-8"))]
    return [LabeledAnswer(Exchange(r["request"], r["answer"]), r["label"]) for r in rows]


def agreement(judge: Judge, labeled: Sequence[LabeledAnswer]) -> Agreement:
    """Judge all labeled answers and count the results. Raises what the judge raises."""
    verdicts = judge.verdicts([answer.exchange for answer in labeled])
    counts: dict[tuple[Verdict, Verdict], int] = {}
    for answer, verdict in zip(labeled, verdicts, strict=True):
        counts[answer.label, verdict] = counts.get((answer.label, verdict), 0) + 1
    return Agreement(judge.name, counts)
