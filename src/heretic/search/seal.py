"""A hash stored with every trial, over its parameters and what was measured: a database does not notice a bit that flips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic.search.fidelity import BEATEN

SEAL = "sha256"  # in what is stored of the measurement
MEASURED = ("scores", BEATEN)


def sealed(measured: dict[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of a trial, as plain data with its seal."""
    return {**measured, SEAL: _digest(measured, params)}


def broken(study: optuna.Study) -> list[int]:
    """The finished trials whose seal does not hold; those of earlier versions have none and are believed."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial.number for trial in complete if not _holds(trial)]


def _holds(trial: FrozenTrial) -> bool:
    for kind in MEASURED:
        measured = dict(trial.user_attrs.get(kind) or {})
        seal = measured.pop(SEAL, None)
        if seal is not None and seal != _digest(measured, trial.params):
            return False
    return True


def _digest(measured: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    # By way of JSON, as the storage does it: tuples become lists.
    return hashlib.sha256(json.dumps([measured, dict(params)], sort_keys=True).encode()).hexdigest()
