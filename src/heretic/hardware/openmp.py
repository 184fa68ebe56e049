"""Set how PyTorch's threads wait for each other, before PyTorch reads the environment."""

from __future__ import annotations

import os
import sys

# With OMP_WAIT_POLICY, libgomp (in PyTorch's wheels) sleeps without spinning (GOMP_SPINCOUNT in its manual). The runtimes of
# Intel and LLVM (in conda's PyTorch) still spin for KMP_BLOCKTIME milliseconds, by default 200.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
CHOICES = (*PASSIVE, "GOMP_SPINCOUNT", "KMP_LIBRARY")  # a user's own settings


def wait_passively() -> None:
    """Let waiting threads sleep instead of spin, so that other programs can use the cores.

    Does nothing if PyTorch is already imported or the user has set one of `CHOICES`.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ.update(PASSIVE)
