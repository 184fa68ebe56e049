"""Objectives and limits by the names of scorers: plain data without torch, like the scores that they read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from heretic.scoring.scores import Scores

Better = Literal["lower", "higher"]
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}(\.[a-z0-9_]{1,40})?")  # of a scorer, with a detail or not
MOST_EXCESS = 1e9  # of a destroyed model, since Optuna stores finite numbers


@dataclass(frozen=True)
class Objective:
    """A number that the search optimizes."""

    name: str  # as in `Scores.value`
    better: Better = "lower"

    def cost(self, scores: Scores) -> float:
        """Return the number so that lower is better; infinite if it was not measured."""
        value = scores.value(self.name)
        if value is None:
            return math.inf
        return value if self.better == "lower" else -value


DEFAULT_OBJECTIVES = (Objective("kl"), Objective("refusals"))


@dataclass(frozen=True)
class Limits:
    """Worst values that a trial on the Pareto front may have."""

    bounds: Mapping[str, tuple[float, Better]] = field(default_factory=dict)  # by name

    def excess(self, scores: Scores) -> dict[str, float]:
        """Return by name how far the value is beyond its limit; at most 0 is feasible, as in Optuna's `Trial.set_constraint`.

        Numbers that were not measured are omitted.
        """
        return {
            name: _clamped(Objective(name, better).cost(scores) - (limit if better == "lower" else -limit))
            for name, (limit, better) in self.bounds.items()
            if scores.value(name) is not None
        }


def _clamped(excess: float) -> float:
    """Return a finite excess, as the storage holds it."""
    return max(-MOST_EXCESS, min(excess, MOST_EXCESS))


NO_LIMITS = Limits()
