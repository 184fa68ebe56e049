"""How much is done to it: a little in every run of the suite, all of it with FAULTS=full (`make test-faults`)."""

from __future__ import annotations

import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest
from filelock import FileLock

from heretic.runs.environment import versions

# Long files come first, but for a short one: the third is given to the worker that has the longest, as soon as it begins.
ORDER = ("killed", "storm", "secrets", "hostile", "steps", "memory", "load", "disks", "same", "beside", "run_folder")
FULL = os.environ.get("FAULTS") == "full"
Amount = Callable[[int, int], int]
Tally = Callable[[str, int, str], None]
Rows = dict[tuple[str, str], int]
ROWS: dict[str, Rows] = defaultdict(dict)  # by test file
SECONDS: dict[str, float] = defaultdict(float)
FAILED: set[str] = set()


only_full = pytest.mark.skipif(not FULL, reason="takes long: make test-faults")


@pytest.fixture
def amount() -> Amount:
    """`amount(a few, many)`: how often something is tried."""
    return lambda few, many: many if FULL else few


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Note what was done, how often, and what was lost: a line of docs/reliability_table.md. What is done again adds up."""
    rows = ROWS[request.path.name]

    def note(done: str, times: int, lost: str) -> None:
        if times:
            rows[done, lost] = rows.get((done, lost), 0) + times

    return note


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In full the longest files come first: last, one would keep one core busy alone."""
    places = {f"test_{name}.py": place for place, name in enumerate(ORDER)}
    if FULL:
        items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Time by test file, and which have failed."""
    name = Path(report.location[0]).name
    SECONDS[name] += report.duration
    if report.failed:
        FAILED.add(name)


def pytest_sessionfinish() -> None:
    """Put what was counted where FAULTS_TABLE says, a section for each test file; those of files that were not run stay.

    Every worker of pytest-xdist does so for its own files, one after the other.
    """
    out = os.environ.get("FAULTS_TABLE")
    if out and ROWS:
        with FileLock(Path(tempfile.gettempdir()) / "heretic-faults-table.lock"):
            _add_to(Path(out))


def _add_to(path: Path) -> None:
    kept = re.split(r"\n(?=## )", path.read_text(encoding="utf-8"))[1:] if path.exists() else []
    sections = {match[1]: text.rstrip() for text in kept if (match := re.match(r"## `([\w.]+)`", text))}
    for name, rows in ROWS.items():
        if name in FAILED:  # a table of what went well would be half the truth
            continue
        sections[name] = section(name, rows)
    head = "# What was done to it\n\nMade by `make test-faults` on a CPU; what it means is in [reliability.md](reliability.md).\n"
    path.write_text("\n".join([head, *(sections[n] + "\n" for n in sorted(sections))]), encoding="utf-8")


def section(name: str, rows: Rows) -> str:
    """What the tests of a file have counted, when and with what."""
    made = versions()
    much = "in full" if FULL else "a little, as in make test"
    when = f"{datetime.now(timezone.utc):%Y-%m-%d}, {much}, {SECONDS[name]:.0f} s, torch {made['torch']}, optuna {made['optuna']}"
    lines = [f"## `{name}`", "", f"{when}.", "", "|done|times|lost|", "|---|---|---|"]
    return "\n".join(lines + [f"|{done}|{times}|{lost}|" for (done, lost), times in rows.items()])
