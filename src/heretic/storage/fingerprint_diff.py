"""Differences between two fingerprints of a study, and the package versions in a fingerprint."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from heretic._version import __version__


def relevant_versions() -> dict[str, str]:
    """Return the versions that can change measurements: PyTorch and transformers (major.minor), heretic (full).

    They are compared only if several machines share a study. A local run can continue after an update.
    """
    named = {name: version(name).split("+")[0].split(".") for name in ("torch", "transformers")}
    return {"heretic": __version__, **{name: ".".join(parts[:2]) for name, parts in named.items()}}


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
