"""The search space: which ablations a study tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from heretic.ablation.ablation import Ablation
from heretic.ablation.kernel import Kernel
from heretic.settings import KernelSpace, Search


def sample(trial: optuna.trial.BaseTrial, search: Search, num_layers: int, components: Sequence[str]) -> Ablation:
    """Draw one ablation. All parameters are drawn for every trial, so that TPE sees one space without branches."""
    depth = num_layers - 1
    scope: Any = trial.suggest_categorical("direction_scope", search.direction_scope)
    index = trial.suggest_float("direction_index", *(share * depth for share in search.direction_index))
    kernels = {c: _kernel(trial, c, getattr(search, c), depth) for c in components}
    return Ablation(scope, index, kernels)


def from_params(params: Mapping[str, Any], search: Search, num_layers: int, components: Sequence[str]) -> Ablation:
    """The ablation that a stored trial's parameters stand for."""
    return sample(optuna.trial.FixedTrial(dict(params)), search, num_layers, components)


def _kernel(trial: optuna.trial.BaseTrial, component: str, space: KernelSpace, depth: int) -> Kernel:
    # Below 0 counts as 0: an interval of the space, not a single point, stands for leaving the component alone.
    largest = max(0.0, trial.suggest_float(f"{component}.max_weight", *space.max_weight))
    position = trial.suggest_float(
        f"{component}.max_weight_position", *(share * depth for share in space.max_weight_position)
    )
    smallest = trial.suggest_float(f"{component}.min_weight", *space.min_weight)
    distance = trial.suggest_float(
        f"{component}.min_weight_distance", *(share * depth for share in space.min_weight_distance)
    )
    # At least half a layer, or a kernel could fall between two layers and do nothing.
    return Kernel(largest, position, smallest * largest, max(distance, 0.5))
