"""How much is done to it: a little in every run of the suite, all of it with FAULTS=full (`make test-faults`)."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

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
    """Note what was done, how often, and what was lost: a row of benchmarks/results/faults.json. What is done again adds up."""
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
    """Put what was counted where FAULTS_RESULTS says, by test file; what is known of files that were not run stays.

    Every worker of pytest-xdist does so for its own files, one after the other.
    """
    out = os.environ.get("FAULTS_RESULTS")
    if out and ROWS:
        with FileLock(Path(tempfile.gettempdir()) / "heretic-faults-results.lock"):
            _add_to(Path(out))


def _add_to(path: Path) -> None:
    files = json.loads(path.read_text(encoding="utf-8"))["files"] if path.exists() else {}
    for name, rows in ROWS.items():
        if name not in FAILED:  # results of what went well alone would be half the truth
            files[name] = section(name, rows)
    results = {"command": "make test-faults", "files": dict(sorted(files.items()))}
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def section(name: str, rows: Rows) -> dict[str, Any]:
    """What the tests of a file have counted, when and with what."""
    made = versions()
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "in_full": FULL,
        "seconds": round(SECONDS[name]),
        "versions": {package: made[package] for package in ("torch", "optuna")},
        "rows": [{"done": done, "times": times, "lost": lost} for (done, lost), times in rows.items()],
    }
