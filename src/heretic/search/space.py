"""Search space: the ablations that a study samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from heretic.ablation.ablation import Ablation
from heretic.ablation.strength_kernel import StrengthKernel
from heretic.errors import UserError, plain_line
from heretic.search.gradient_path import GradientPath
from heretic.settings import KernelSpace, SearchSettings

GAIN = (0.5, 2.0)  # of a component, and of a third of the edited layers
SHIFT = 1.0  # layers


@dataclass(frozen=True)
class SearchSpace:
    """The ablations of a model: strength kernels, or variations of a gradient path."""

    search: SearchSettings
    num_layers: int
    components: Sequence[str]
    path: GradientPath | None = None

    def sample(self, trial: optuna.trial.BaseTrial) -> Ablation:
        """Sample one ablation; parameters that the trial already has are reused."""
        gradient_path = self.path
        if gradient_path is None or not gradient_path.points or self.search.start == "kernels":
            return self._by_kernels(trial)
        return self._around_path(trial, gradient_path)

    def from_params(self, params: Mapping[str, Any]) -> Ablation:
        """Build the ablation of a stored trial's parameters. Raises UserError if they are not of this space."""
        try:
            ablation = self.sample(optuna.trial.FixedTrial(dict(params)))
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise foreign_parameters(error) from None
        numbers = [value for value in params.values() if isinstance(value, float)]
        if not all(map(math.isfinite, numbers)) or not _finite(ablation):
            raise foreign_parameters("a number is not finite")
        return ablation

    def initial_params(self) -> list[dict[str, Any]]:
        """Return the parameters of the points of the gradient path, largest weight first."""
        if self.path is None or self.search.start == "kernels":
            return []
        middle: dict[str, Any] = {name: 1.0 for name in self._gains}
        if self.path.uses_layer_directions:
            middle["path.shift"] = 0.0
        return [middle | {"path.point": float(i)} for i in reversed(range(len(self.path.points)))]

    @property
    def _gains(self) -> list[str]:
        return [f"path.{part}" for part in (*self.components, "early", "middle", "late")]

    def _around_path(self, trial: optuna.trial.BaseTrial, gradient_path: GradientPath) -> Ablation:
        position = trial.suggest_float("path.point", 0.0, float(len(gradient_path.points) - 1))
        gain = {name: trial.suggest_float(name, *GAIN, log=True) for name in self._gains}
        shift = trial.suggest_float("path.shift", -SHIFT, SHIFT) if gradient_path.uses_layer_directions else 0.0
        first, last = gradient_path.edited_layer_range
        third = max(1.0, (last - first + 1) / 3)
        thirds = [("early", "middle", "late")[min(2, max(0, int((n - first) / third)))] for n in range(self.num_layers)]
        gains = {c: [gain[f"path.{c}"] * gain[f"path.{part}"] for part in thirds] for c in self.components}
        return gradient_path.at(position, gains, shift)

    def _by_kernels(self, trial: optuna.trial.BaseTrial) -> Ablation:
        """Sample every parameter in every trial, so that the space has no branches for TPE."""
        search, depth = self.search, self.num_layers - 1

        scope = trial.suggest_categorical("direction_scope", search.direction_scope)
        index = trial.suggest_float("direction_index", *(share * depth for share in search.direction_index))
        kernels = {c: _kernel(trial, c, getattr(search, c), depth) for c in self.components if hasattr(search, c)}
        return Ablation.from_kernels(kernels, self.num_layers, index if scope == "global" else None)


def _finite(ablation: Ablation) -> bool:
    parts = [*ablation.strengths.values(), ablation.mixture, ablation.vector]
    numbers = itertools.chain(*(part for part in parts if part is not None))
    return all(math.isfinite(number) for number in (*numbers, ablation.shift))


def foreign_parameters(why: object) -> UserError:
    """Create the error for a trial whose parameters do not belong to this search space."""
    return UserError(
        f"The parameters of a stored trial do not fit this model's search space: {plain_line(str(why))[:200]}",
        code="damaged-study",
        where="study",
        fix="restore a copy of the study, or start over with --fresh (heretic keeps the old run)",
    )


def describe(params: Mapping[str, Any]) -> str:
    """Describe a trial's ablation in a few words."""
    if "path.point" in params:
        return f"path {params['path.point']:.2f}"
    scope, index = params.get("direction_scope"), params.get("direction_index")
    if scope == "global" and isinstance(index, float):
        return f"layer {index:.1f}"
    return "per layer" if scope == "per_layer" else "other parameters"


def _kernel(trial: optuna.trial.BaseTrial, component: str, space: KernelSpace, depth: int) -> StrengthKernel:
    # Below 0 counts as 0: an interval of the space, not a single point, leaves the component unedited.
    largest = max(0.0, trial.suggest_float(f"{component}.max_weight", *space.max_weight))
    position = trial.suggest_float(
        f"{component}.max_weight_position", *(share * depth for share in space.max_weight_position)
    )
    smallest = trial.suggest_float(f"{component}.min_weight", *space.min_weight)
    distance = trial.suggest_float(
        f"{component}.min_weight_distance", *(share * depth for share in space.min_weight_distance)
    )
    # At least half a layer, or a kernel could fall between two layers and do nothing.
    return StrengthKernel(largest, position, smallest * largest, max(distance, 0.5))
