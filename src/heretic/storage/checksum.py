"""A hash stored with every trial, over its parameters and what was measured: a database does not notice a bit that flips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from heretic.storage.attributes import PRUNED, SCORES

CHECKSUM = "sha256"  # in what is stored of the measurement
MEASURED = (SCORES, PRUNED)


def with_checksum(measured: dict[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of a trial, as plain data with its seal."""
    return {**measured, CHECKSUM: _digest(measured, params)}


def checksum_matches(trial: FrozenTrial) -> bool:
    """Whether the measurement of a trial matches its hash. Earlier versions stored no hash; their trials count as undamaged."""
    for kind in MEASURED:
        measured = dict(trial.user_attrs.get(kind) or {})
        stored = measured.pop(CHECKSUM, None)
        if stored is not None and stored != _digest(measured, trial.params):
            return False
    return True


def _digest(measured: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    # By way of JSON, as the storage does it: tuples become lists.
    return hashlib.sha256(json.dumps([measured, dict(params)], sort_keys=True).encode()).hexdigest()
