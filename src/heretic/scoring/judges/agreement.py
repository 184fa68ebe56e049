"""How far a judge can be trusted: its verdicts on short answers that were labeled by hand.

The set ships with the project, is about harmless things only, and holds hard cases on purpose: polite and wordless refusals,
answers that say "sorry" or "illegal", evasions without any telling phrase. So it says where a judge errs rather than how often
it will err on answers of a certain model.
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
    """A request, an answer, and what a person says of it."""

    said: Exchange
    label: Verdict


@dataclass(frozen=True)
class Fraction:
    """`part` of `whole`."""

    part: int
    whole: int

    @property
    def value(self) -> float:
        """The share itself; not a number where there is nothing."""
        return self.part / self.whole if self.whole else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Wilson)."""
        return wilson(self.part, self.whole)

    def __str__(self) -> str:
        """All of it in a few words."""
        low, high = self.interval
        return f"{self.value:.0%} ({self.part} of {self.whole}; 95 % interval {low:.0%} to {high:.0%})"


@dataclass(frozen=True)
class Agreement:
    """What a judge said of labeled answers: how often by (label, verdict)."""

    judge: str
    counts: dict[tuple[Verdict, Verdict], int]

    @property
    def agreement(self) -> Fraction:
        """Answers on which judge and label are the same, of all."""
        return Fraction(sum(n for (label, said), n in self.counts.items() if label == said), sum(self.counts.values()))

    @property
    def precision(self) -> Fraction:
        """Of what the judge calls a refusal, what is one."""
        called = sum(n for (_, said), n in self.counts.items() if said == REFUSAL)
        return Fraction(self.counts.get((REFUSAL, REFUSAL), 0), called)

    @property
    def recall(self) -> Fraction:
        """Of the refusals, what the judge calls one."""
        are = sum(n for (label, _), n in self.counts.items() if label == REFUSAL)
        return Fraction(self.counts.get((REFUSAL, REFUSAL), 0), are)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        shares = {"agreement": self.agreement, "precision": self.precision, "recall": self.recall}
        table = {label: {said: self.counts.get((label, said), 0) for said in ORDER} for label in ORDER}
        numbers = {
            name: {"value": s.value if s.whole else None, "of": s.whole, "interval": s.interval}
            for name, s in shares.items()
        }
        return {"judge": self.judge, **numbers, "labeled_and_judged": table}

    def rows(self) -> list[tuple[str, str]]:
        """For the screen."""
        shown = [
            ("judge", self.judge),
            ("agreement", str(self.agreement)),
            ("precision of refusals", str(self.precision)),
            ("recall of refusals", str(self.recall)),
        ]
        for label in ORDER:
            judged = ", ".join(f"{self.counts.get((label, said), 0)} {said}" for said in ORDER)
            shown.append((f"labeled {label}", f"judged {judged}"))
        return shown


def labeled_answers() -> list[LabeledAnswer]:
    """The set that ships with the project."""
    file = resources.files("heretic") / "scoring" / "judges" / "labeled_answers.jsonl"
    rows = [json.loads(line) for line in split_lines(file.read_text(encoding="utf-8"))]
    return [LabeledAnswer(Exchange(r["request"], r["answer"]), r["label"]) for r in rows]


def agreement(judge: Judge, labeled: Sequence[LabeledAnswer]) -> Agreement:
    """Have the judge look at all of them. Raises what the judge raises."""
    verdicts = judge.verdicts([one.said for one in labeled])
    counts: dict[tuple[Verdict, Verdict], int] = {}
    for one, verdict in zip(labeled, verdicts, strict=True):
        counts[one.label, verdict] = counts.get((one.label, verdict), 0) + 1
    return Agreement(judge.name, counts)
