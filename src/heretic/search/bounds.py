"""Bounds of the kernels' space that give way where the front crowds against them.

Looked at after every twenty finished trials, from those trials alone, and stored with the study: whoever goes on with it draws
within the same bounds. Optuna lets the range of a parameter change from trial to trial; TPE then models that parameter for
itself instead of together with the others.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import TrialState

from heretic.search.attributes import WIDENED, widened_bounds
from heretic.search.front import front, results_of
from heretic.search.space import Space

EVERY = 20  # finished trials
FEWEST = 3  # trials on the front that say something
CROWDED = 0.5  # of them, in the uppermost tenth of the range
STEP = 0.5  # how far a bound moves, in shares of the range that the settings give
MOST_STEPS = 3


def widened(study: optuna.Study, space: Space) -> Space:
    """The space with the bounds that hold for the next trial; the space itself where the settings do not ask for this."""
    if not space.search.widen_bounds or space.search.start == "gradient":
        return space
    looks = widened_bounds(study)
    due = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) // EVERY
    while len(looks) < due:
        looks.append(_look(study, space, looks[-1] if looks else {}, EVERY * (len(looks) + 1)))
        study.set_user_attr(WIDENED, json.dumps(looks))
    return replace(space, search=space.search.model_copy(update=_tables(space, looks[-1]))) if looks else space


def _look(study: optuna.Study, space: Space, before: dict[str, float], trials: int) -> dict[str, float]:
    """The upper bounds of the largest strength after so many finished trials, of those components where it has moved."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))[:trials]
    best = [r.params for r in front(results_of(study, finished))]
    bounds = dict(before)
    for component in space.components:
        low, high = getattr(space.search, component).max_weight
        now = before.get(component, high)
        strongest = [p[f"{component}.max_weight"] for p in best if f"{component}.max_weight" in p]
        near = sum(s > now - 0.1 * (now - low) for s in strongest)
        if len(strongest) >= FEWEST and near >= CROWDED * len(strongest):
            bounds[component] = min(now + STEP * (high - low), high + MOST_STEPS * STEP * (high - low))
    return bounds


def _tables(space: Space, bounds: dict[str, float]) -> dict[str, Any]:
    """The components' tables of settings with these bounds."""
    tables = {component: getattr(space.search, component) for component in bounds}
    return {
        component: table.model_copy(update={"max_weight": [table.max_weight[0], bounds[component]]})
        for component, table in tables.items()
    }
