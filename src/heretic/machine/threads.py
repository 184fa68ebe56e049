"""How the CPU's threads wait for each other."""

from __future__ import annotations

from collections.abc import MutableMapping

# OpenMP threads spin while they wait. Beside a busy process a spinning thread takes the core that the awaited one needs, and many
# small operations become several times slower (benchmarks/busy_neighbors.py). GNU's runtime, which PyTorch's Linux builds bring,
# reads the first; Intel's and LLVM's also read the second.
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def wait_passively(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP threads sleep while they wait, unless the user has set how they wait.

    Args:
        environment: the process's, before PyTorch is imported: the runtimes read it when they are loaded, and child processes
            inherit it.
    """
    if not {*PASSIVE_WAITING, "GOMP_SPINCOUNT"} & environment.keys():
        environment.update(PASSIVE_WAITING)
