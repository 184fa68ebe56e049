"""Checksum of a trial's parameters and measurements, since a database does not detect flipped bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from heretic.storage.attributes import PRUNED, SCORES

CHECKSUM = "sha256"  # key in the stored measurement
MEASURED = (SCORES, PRUNED)


def with_checksum(measured: dict[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Add a checksum to a measurement (plain data)."""
    return {**measured, CHECKSUM: _digest(measured, params)}


def checksum_matches(trial: FrozenTrial) -> bool:
    """Return whether a trial's measurement matches its checksum; True for trials of versions that stored none."""
    for kind in MEASURED:
        measured = dict(trial.user_attrs.get(kind) or {})
        stored = measured.pop(CHECKSUM, None)
        if stored is not None and stored != _digest(measured, trial.params):
            return False
    return True


def _digest(measured: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    # As JSON, like in the storage: tuples become lists.
    return hashlib.sha256(json.dumps([measured, dict(params)], sort_keys=True).encode()).hexdigest()
