"""Set how many threads PyTorch has and how they wait for each other, before PyTorch reads the environment."""

from __future__ import annotations

import os
import sys

from heretic.hardware.cpu import cpu_quota

# With OMP_WAIT_POLICY, libgomp (in PyTorch's wheels) sleeps without spinning (GOMP_SPINCOUNT in its manual). The runtimes of
# Intel and LLVM (in conda's PyTorch) still spin for KMP_BLOCKTIME milliseconds, by default 200.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
CHOICES = (*PASSIVE, "GOMP_SPINCOUNT", "KMP_LIBRARY")  # a user's own settings
THREADS = "OMP_NUM_THREADS"
_set_here: list[str] = []


def prepare_threads() -> None:
    """Set up PyTorch's threads; see `wait_passively` and `respect_quota`."""
    wait_passively()
    respect_quota()


def wait_passively() -> None:
    """Let waiting threads sleep instead of spin, so that other programs can use the cores.

    Does nothing if PyTorch is already imported or the user has set one of `CHOICES`.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ.update(PASSIVE)


def respect_quota() -> None:
    """Let PyTorch use the cores that a container may use, not all that it sees; more threads would wait for each other.

    Does nothing if PyTorch is already imported or the user has set a number.
    """
    if "torch" in sys.modules or THREADS in os.environ:
        return
    quota = cpu_quota()  # not the affinity, which PyTorch asks itself
    if quota is not None and quota < (os.cpu_count() or 1):
        os.environ[THREADS] = str(max(1, quota))
        _set_here.append(os.environ[THREADS])


def threads_of_user() -> str | None:
    """Return the number of threads that the user has set, if any."""
    threads = os.environ.get(THREADS)
    return None if threads in _set_here else threads
