"""Directional ablation of open-weight language models, driven by one TOML file.

From Python: `from heretic import load, study`; see docs/python.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from heretic._version import __version__

if TYPE_CHECKING:
    from heretic.ablation.ablation import Ablation
    from heretic.ablation.directions import Directions
    from heretic.ablation.strength_kernel import StrengthKernel
    from heretic.errors import UserError
    from heretic.pipeline.api import AblationSession, load, study
    from heretic.scoring.evaluator import Scores

__all__ = [
    "Ablation",
    "AblationSession",
    "Directions",
    "Scores",
    "StrengthKernel",
    "UserError",
    "__version__",
    "load",
    "study",
]

# Where each name is; looked up when it is first used, so that `import heretic` and the command's --help load no torch.
_HOMES = {
    "Ablation": "heretic.ablation.ablation",
    "Directions": "heretic.ablation.directions",
    "StrengthKernel": "heretic.ablation.strength_kernel",
    "AblationSession": "heretic.pipeline.api",
    "Scores": "heretic.scoring.evaluator",
    "UserError": "heretic.errors",
    "load": "heretic.pipeline.api",
    "study": "heretic.pipeline.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'heretic' has no attribute {name!r}")
    from heretic.hardware.openmp import wait_passively

    wait_passively()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
