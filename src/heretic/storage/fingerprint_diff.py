"""Differences between two fingerprints of a study, and the package versions in a fingerprint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from heretic._version import __version__

RELEVANT = ("heretic", "torch", "transformers")  # packages that can change measurements


def relevant_versions(installed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the versions that can change measurements: PyTorch and transformers (major.minor), heretic (full).

    Machines that share a study must agree in them. A local run goes on after an update, with a warning (`runs/metadata.py`).

    Args:
        installed: full versions by package, of a stored session; None: those of this process.
    """
    if installed is None:
        installed = {name: __version__ if name == "heretic" else version(name) for name in RELEVANT}
    return {
        name: full if name == "heretic" else ".".join(full.split("+")[0].split(".")[:2])
        for name in RELEVANT
        if (full := installed.get(name))
    }


def differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List every key whose value differs, as 'key: was stored, now current'; hashes are shortened to eight digits."""
    before, after = _flat(json.loads(json.dumps(stored))), _flat(json.loads(json.dumps(now)))
    return [
        f"{key}: was {_short(before.get(key))}, now {_short(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:8]}…"
    return text if len(text) <= 60 else f"{text[:57]}…"
