"""A scorer's numbers for the original and an ablated model, with the difference: plain data without torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heretic.scoring.objectives import Better
from heretic.scoring.scores import json_numbers

if TYPE_CHECKING:
    from heretic.scoring.scorers.scorer import Measurement, Scorer


@dataclass(frozen=True)
class Comparison:
    """One number of a scorer for both models."""

    name: str  # `unchanged`, `own_answer_kl.p95`
    unit: str
    better: Better
    original: float
    ablated: float
    error: float | None = None  # standard error of the difference; None: not a mean over prompts or tasks
    total: float | None = None  # of how many; None: not a count

    @property
    def difference(self) -> float:
        """Ablated minus original."""
        return self.ablated - self.original

    @property
    def difference_text(self) -> str:
        """Format the difference with its standard error."""
        if not math.isfinite(self.difference):
            return ""
        sign = "+" if self.difference > 0 else ""
        error = f" ± {number_text(self.error)}" if self.error is not None else ""
        return f"{sign}{number_text(self.difference)}{error}"

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        numbers = {"original": self.original, "ablated": self.ablated, "difference": self.difference}
        numbers |= {k: n for k, n in (("standard_error", self.error), ("total", self.total)) if n is not None}
        return {"name": self.name, "unit": self.unit, "better": self.better, **json_numbers(numbers)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Restore a comparison from `as_dict`. Raises LookupError, TypeError and ValueError for other data."""
        error, total = (None if (n := data.get(k)) is None else float(n) for k in ("standard_error", "total"))
        better: Better = "higher" if data["better"] == "higher" else "lower"
        numbers = float(data["original"]), float(data["ablated"])
        return cls(str(data["name"]), str(data["unit"]), better, *numbers, error, total)


def compare(scorer: Scorer, original: Measurement, ablated: Measurement) -> list[Comparison]:
    """Compare the scorer's value, then its details. The standard error is that of paired differences."""
    of_value = paired_error(original.items, ablated.items), ablated.details.get("total")
    before, after = original.named(scorer.name), ablated.named(scorer.name)
    return [
        Comparison(name, scorer.unit, scorer.better, before[name], after[name], *(of_value * (name == scorer.name)))
        for name in before
        if name != f"{scorer.name}.total"
    ]


def paired_error(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Compute the standard error of the mean of after minus before; None without at least two finite pairs."""
    if len(before) != len(after) or len(before) < 2:
        return None
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if not all(map(math.isfinite, differences)):
        return None
    return statistics.stdev(differences) / math.sqrt(len(differences))


def number_text(number: float | None, total: float | None = None) -> str:
    """Format a scorer's number: counts as '3' or '3/40', other numbers with four digits; empty if not measured."""
    if number is None:
        return ""
    text = f"{number:g}" if abs(number) < 1e6 and number == int(number) else f"{number:.4g}"
    return text if total is None else f"{text}/{number_text(total)}"


def values_text(values: Mapping[str, float]) -> dict[str, str]:
    """Format the numbers of scorers by name, a `total` with its number."""
    own = {name: n for name, n in values.items() if not name.endswith(".total")}
    return {name: number_text(n, values.get(f"{name}.total")) for name, n in own.items()}
