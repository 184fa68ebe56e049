"""The manifest of an exported model: from what, with what and how it was made, and what it scored."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import datetime, timezone
from typing import Any

from heretic import __version__
from heretic.scoring.ladder import Scores

PACKAGES = ("torch", "transformers", "accelerate", "optuna", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"heretic": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def scores_text(scores: Scores) -> dict[str, Any]:
    """Scores for a manifest."""
    data = scores.as_dict()
    data.pop("seconds")
    return data
