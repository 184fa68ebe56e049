"""Measures chosen scorers on the original and on ablated models that one batch of trials shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from heretic.errors import Interrupted, UserError, first_line
from heretic.model.batching import out_of_memory
from heretic.model.device_errors import is_device_error
from heretic.scoring.comparison import Comparison, compare
from heretic.scoring.scorers.context import Applied, ModelParts, ScorerContext, TrialGroup
from heretic.scoring.scorers.scorer import Measurement, Scorer

T = TypeVar("T")
Originals = Mapping[str, tuple[Any, Measurement]]  # by scorer: its baseline, and its numbers of the original


@dataclass
class Measurer:
    """Measures scorers, with the original's answers and baselines kept for all later models."""

    scorers: Mapping[str, Scorer]  # by name
    parts: ModelParts
    baselines: dict[str, Any] = field(default_factory=dict)
    original_values: dict[str, Measurement] = field(default_factory=dict)
    original: ScorerContext = field(init=False)

    def __post_init__(self) -> None:
        self.original = ScorerContext(TrialGroup(self.parts))

    def of_original(self, names: Iterable[str]) -> dict[str, Measurement]:
        """Measure these scorers on the original; each only once. Raises UserError."""
        for name in names:
            if name not in self.original_values:
                self.original_values[name] = self._measure(name, self.original)
        return {name: self.original_values[name] for name in names}

    def of_trials(self, names: Sequence[str], applied: Applied, count: int) -> list[dict[str, Measurement]]:
        """Measure these scorers on the `count` trials that `applied` ablates.

        Raises:
            UserError: a scorer failed, or did not return a number.
        """
        for name in names:  # before the trials, so that nothing is decoded in vain if a baseline fails
            self.baseline(name)
        group = TrialGroup(self.parts, applied, count)
        contexts = [ScorerContext(group, i, self.original) for i in range(count)]
        return [{name: self._measure(name, context) for name in names} for context in contexts]

    def originals(self, names: Iterable[str]) -> Originals:
        """Measure these scorers on the original, for comparison with models that are loaded later. Raises UserError."""
        return {name: (self.baseline(name), found) for name, found in self.of_original(names).items()}

    def of_model(
        self, names: Iterable[str], originals: Originals
    ) -> tuple[dict[str, Measurement], tuple[Comparison, ...]]:
        """Measure the loaded model itself, and compare it with an original that is not in memory. Raises UserError."""
        self.baselines.update({name: baseline for name, (baseline, _) in originals.items()})
        measured = self.of_original(names)  # the loaded model takes its place
        compared = [c for n, (_, before) in originals.items() for c in compare(self.scorers[n], before, measured[n])]
        return measured, tuple(compared)

    def baseline(self, name: str) -> Any:
        """Return a scorer's baseline on the original, computed once. Raises UserError."""
        if name not in self.baselines:
            scorer = self.scorers[name]
            self.baselines[name] = called(name, lambda: scorer.baseline(self.original))
        return self.baselines[name]

    def _measure(self, name: str, context: ScorerContext) -> Measurement:
        scorer, baseline = self.scorers[name], self.baseline(name)
        return checked(scorer, called(name, lambda: scorer.score(context, baseline)))


def checked(scorer: Scorer, returned: Any) -> Measurement:
    """Return what a scorer returned as a measurement with exactly the details that it declares.

    Infinity is allowed, for a destroyed model. Raises UserError for anything else that is not a number.
    """
    given = returned if isinstance(returned, Measurement) else Measurement(returned)
    try:  # numbers of NumPy and PyTorch become Python's
        details = {str(name): float(number) for name, number in given.details.items()}
        found = Measurement(float(given.value), details, tuple(float(item) for item in given.items))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(
            f"The scorer '{scorer.name}' returned {type(given.value).__name__}, not a number or a Measurement of numbers.",
            code="scorer-result",
            where=f"scorer {scorer.name}",
            fix="return one float for the model",
        ) from None
    if set(found.details) != set(scorer.details):
        raise UserError(
            f"The scorer '{scorer.name}' returned the details {', '.join(sorted(found.details)) or 'none'}.",
            code="scorer-result",
            where=f"scorer {scorer.name}",
            fix=f"return those that the class declares: {', '.join(scorer.details) or 'none'}",
        )
    numbers = found.named(scorer.name)
    if wrong := [name for name, number in numbers.items() if math.isnan(number)]:
        raise UserError(
            f"The scorer '{scorer.name}' returned NaN for {wrong[0]}.",
            code="scorer-result",
            where=f"scorer {scorer.name}",
            fix="return a number for every model, infinity for a destroyed one",
        )
    return found


def called(name: str, call: Callable[[], T]) -> T:
    """Call a scorer, and translate the errors of its own code. Raises UserError."""
    try:
        return call()
    except (UserError, Interrupted):
        raise
    except Exception as error:  # a user's file can raise anything
        if out_of_memory(error) or is_device_error(error):
            raise
        raise UserError(
            f"The scorer '{name}' failed with {type(error).__name__}: {first_line(error)[:200]}",
            code="scorer-failed",
            where=f"scorer {name}",
            fix="correct the scorer, or remove its name from the settings",
        ) from error
