"""How PyTorch's threads wait for each other, set before PyTorch reads it."""

from __future__ import annotations

import os
import sys

# OMP_WAIT_POLICY is OpenMP's own. libgomp, which the wheels of PyTorch carry, then sleeps without spinning (GOMP_SPINCOUNT in its
# manual). The runtimes of Intel and LLVM, which conda's PyTorch uses, still spin for KMP_BLOCKTIME milliseconds, by default 200.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
CHOICES = (*PASSIVE, "GOMP_SPINCOUNT", "KMP_LIBRARY")  # by which a user decides


def wait_passively() -> None:
    """Let threads that wait for others sleep instead of spinning, so that they leave the cores to other programs.

    Does nothing once PyTorch is imported, since it has read the environment then, or where the user has chosen.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ.update(PASSIVE)
