"""How much is done to it: a little in every run of the suite, all of it with FAULTS=full (`make test-faults`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

FULL = os.environ.get("FAULTS") == "full"
ROWS: list[tuple[str, int, str]] = []
Amount = Callable[[int, int], int]
Tally = Callable[[str, int, str], None]


only_full = pytest.mark.skipif(not FULL, reason="takes long: make test-faults")


@pytest.fixture
def amount() -> Amount:
    """`amount(a few, many)`: how often something is tried."""
    return lambda few, many: many if FULL else few


@pytest.fixture
def tally() -> Tally:
    """Note what was done, how often, and what was lost: a line of the table in docs/reliability.md."""
    return lambda done, times, lost: ROWS.append((done, times, lost))


def pytest_sessionfinish() -> None:
    """Write the table where FAULTS_TABLE says."""
    out = os.environ.get("FAULTS_TABLE")
    if out and ROWS:
        lines = ["| what was done | how often | what was lost |", "|---|---|---|"]
        lines += [f"| {done} | {times} | {lost} |" for done, times, lost in ROWS]
        Path(out).write_text("\n".join(lines) + "\n")
