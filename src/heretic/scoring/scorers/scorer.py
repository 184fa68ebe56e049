"""The protocol of a scorer: what is measured of a model, as one number that the search can use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from heretic.scoring.objectives import Better

if TYPE_CHECKING:
    from heretic.scoring.scorers.context import ScorerContext
    from heretic.settings import Settings

Positive = Annotated[int, Field(ge=1)]  # type of an option


@dataclass(frozen=True)
class Measurement:
    """A scorer's number for one model."""

    value: float
    details: Mapping[str, float] = field(default_factory=dict)  # further numbers; `median` of `x` is named `x.median`
    # One number per prompt or task whose mean is `value`, in the same order for every model: gives the standard error.
    items: Sequence[float] = field(default=(), repr=False)

    @classmethod
    def mean_of(cls, items: Sequence[float], details: Mapping[str, float] | None = None) -> Measurement:
        """Create the measurement whose value is the mean of the items."""
        return cls(sum(items) / len(items), details or {}, tuple(items))

    @classmethod
    def count_of(cls, items: Sequence[bool], details: Mapping[str, float] | None = None) -> Measurement:
        """Create the measurement of how many of the items hold, with the detail `total`: of how many."""
        return cls(float(sum(items)), {**(details or {}), "total": float(len(items))})

    def named(self, name: str) -> dict[str, float]:
        """Return value and details by full name."""
        return {name: self.value, **{f"{name}.{detail}": number for detail, number in self.details.items()}}


class Scorer:
    """Measures one number of a model. A subclass is a frozen dataclass if it has options: its fields are the options.

    `score` is called for the original and for every ablated model that needs the number; see `ScorerContext` for what it can use.
    """

    name: ClassVar[str]  # in the settings; lower case, digits and underscores
    meaning: ClassVar[str] = ""  # for tables and documents, in a few words
    unit: ClassVar[str] = ""
    better: ClassVar[Better] = "lower"
    details: ClassVar[tuple[str, ...]] = ()  # names of the further numbers; `total` makes the value "3/40"
    needs_original: ClassVar[bool] = False  # runs the original after the ablated model, so both must be in memory
    in_evaluator: ClassVar[bool] = False  # `TrialEvaluator` measures it, with pruning where `prunable`
    standard: ClassVar[bool] = False  # measured of every exported or evaluated model
    has_own_prompts: ClassVar[bool] = False  # decodes answers to others than `harmful_eval` and `harmless_eval`
    prunable: ClassVar[bool] = False  # has a lower bound while it is measured, so that dominated trials stop early

    @classmethod
    def defaults(cls, settings: Settings) -> dict[str, Any]:
        """Return options that other settings decide unless the user sets them."""
        return {}

    def check(self) -> None:
        """Raise UserError if the options cannot work; called before a run, without a model."""

    def most_tokens(self, response: int) -> int:
        """Return the most tokens of an answer that `score` decodes or reads; `response` is `max_response_length`.

        The memory plan counts with them.
        """
        return response

    def baseline(self, original: ScorerContext) -> Any:
        """Return what `score` compares with; called once, on the original."""
        return None

    def score(self, model: ScorerContext, baseline: Any) -> float | Measurement:
        """Measure the model.

        Args:
            model: the original or an ablated model.
            baseline: the result of `baseline`.

        Raises:
            UserError: the scorer cannot measure this model.
        """
        raise NotImplementedError
