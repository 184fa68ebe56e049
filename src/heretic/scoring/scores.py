"""What is measured of a model: plain data without torch, so that reading a study does not load it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter

OLD_COUNTS = ("over_refusals", "degenerate")  # in `harmless_metrics` of earlier versions, with their `total`


@dataclass(frozen=True)
class Divergence:
    """KL(original || ablated) over prompts, in nats.

    `per_prompt` holds one value per prompt, in order; it is empty in a divergence that was loaded from storage.
    """

    mean: float
    median: float
    p95: float
    max: float
    per_prompt: tuple[float, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        """Format the four numbers in one line."""
        return f"mean {self.mean:.4f}, median {self.median:.4f}, p95 {self.p95:.4f}, max {self.max:.4f}"

    def as_dict(self) -> dict[str, float | str]:
        """Return the four numbers as plain data; see `json_numbers`."""
        return json_numbers({"mean": self.mean, "median": self.median, "p95": self.p95, "max": self.max})


@dataclass(frozen=True)
class RefusalProxy:
    """Proxy of one trial."""

    matching: int  # requests whose reference refusal is greedily reproduced
    probability: float  # mean token probability of the reference refusals
    refused: int  # requests that the original refuses

    def as_dict(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """Measurements of one model: divergence on harmless prompts, refusals of harmful requests."""

    divergence: Divergence
    refusals: int
    total: int  # harmful requests
    seconds: dict[str, float]  # wall time by phase; a shared pass is divided by its trials
    refusal_proxy: RefusalProxy | None = None
    refused: str = ""  # one digit per request: 0 answered, 1 refused, 2 evasive
    refusal_mass: float | None = None  # sum of the probabilities of the reference refusals' first tokens, if measured
    evasive: int = 0  # not included in `refusals`
    judge: str = "markers"  # kind of judge that gave the verdicts
    excess: dict[str, float] = field(default_factory=dict)  # by constraint: distance beyond the limit
    values: dict[str, float] = field(
        default_factory=dict
    )  # of other scorers, by name: `unchanged`, `own_answer_kl.p95`

    @property
    def unanswered(self) -> int:
        """Number of refusals and evasions: an evasion never counts as a success."""
        return self.refusals + self.evasive

    @property
    def within_limits(self) -> bool:
        """Whether every constraint is met."""
        return all(excess <= 0 for excess in self.excess.values())

    @property
    def expected(self) -> float:
        """Expected refusals, an objective of the study: unanswered requests plus the refusal probability of the answered ones.

        Unlike the plain count, it distinguishes an answer that is close to a refusal from one that is not.
        """
        return expected_refusals(self.unanswered, self.refusal_mass)

    def value(self, name: str) -> float | None:
        """Return a scorer's number or detail by its name; None if it was not measured."""
        if name == "kl":
            return self.divergence.mean
        if name == "refusals":
            return self.expected
        scorer, _, detail = name.partition(".")
        if scorer == "kl" and detail in ("median", "p95", "max"):
            return float(getattr(self.divergence, detail))
        if scorer == "refusals" and detail in ("counted", "evasive"):
            return float(self.refusals if detail == "counted" else self.evasive)
        return self.values.get(name)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        numbers = {name: json_numbers(getattr(self, name)) for name in ("excess", "values")}
        return {**asdict(self), "divergence": self.divergence.as_dict(), **numbers}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """Restore scores from `as_dict`; fields with a default may be missing. Raises ValueError."""
        return scores_adapter().validate_python(data)


@functools.cache
def scores_adapter() -> TypeAdapter[Scores]:
    """Return what validates stored scores."""
    return TypeAdapter(Annotated[Scores, BeforeValidator(_with_old_values)])


def _with_old_values(data: Any) -> Any:
    """Move what earlier versions stored as `harmless_metrics` to `values`, where the scorers' numbers are."""
    counts, values = (data.get("harmless_metrics"), data.get("values", {})) if isinstance(data, dict) else (None, None)
    if not isinstance(counts, dict) or not isinstance(values, dict):
        return data
    pairs = [(f"{name}{detail}", key) for name in OLD_COUNTS for detail, key in (("", name), (".total", "total"))]
    return {**data, "values": {**{name: counts.get(key) for name, key in pairs}, **values}}


@dataclass(frozen=True)
class PrunedTrial:
    """Measurements of a trial that was pruned because it could no longer reach the Pareto front."""

    divergence: Divergence
    at_least: int  # lower bound of refusals and evasions
    total: int
    seconds: dict[str, float]
    refusal_proxy: RefusalProxy
    expected_at_least: float = 0.0  # lower bound of `Scores.expected`

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "divergence": self.divergence.as_dict()}


TrialOutcome = Scores | PrunedTrial


def json_numbers(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """Return the numbers with infinities as the strings "inf" and "-inf", since JSON has no such numbers."""
    return {name: n if math.isfinite(n) else "-inf" if n < 0 else "inf" for name, n in numbers.items()}


def expected_refusals(refusals: int, refusal_mass: float | None) -> float:
    """Add the refusal mass of the answered requests to the refusals, rounded to a tenth of a request."""
    return round(refusals + (refusal_mass or 0.0), 1)
