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
    from heretic.scoring.scores import Scores

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

# Module of each public name, imported on first use, so that `import heretic` and the command's --help load no torch.
_MODULES = {
    "Ablation": "heretic.ablation.ablation",
    "AblationSession": "heretic.pipeline.api",
    "Directions": "heretic.ablation.directions",
    "Scores": "heretic.scoring.scores",
    "StrengthKernel": "heretic.ablation.strength_kernel",
    "UserError": "heretic.errors",
    "load": "heretic.pipeline.api",
    "study": "heretic.pipeline.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'heretic' has no attribute {name!r}")
    from heretic.hardware.openmp import prepare_threads

    prepare_threads()
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
