"""What every stage of a run takes of memory: the most in use during it, and what stays when freed memory is given back.

    python benchmarks/stages.py ASSETS [--trials 4] [--set KEY=VALUE ...]

The job of study.py in this process, with a watcher that reads /proc/self/smaps_rollup ten times a second (Linux only). After every
stage the freed memory is given back to the system, which a run does not do so often; so what a stage shows is its own.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import head, options, prompt_settings, write
from memory import looked_at

from heretic.model.batching import free_memory
from heretic.progress import SILENT, Stage
from heretic.run import run
from heretic.settings.layers import resolve
from heretic.stop import Stop


class Stages:
    """A watcher that keeps, for every name of a stage, the largest figures seen."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, float]] = {}
        self._peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """Memory before, at most, and after."""
        free_memory()
        around = self._peak
        before = self._peak = own()
        with SILENT.stage(name, total) as inner:
            yield inner
        peak = max(self._peak, own())
        self._peak = max(around, peak)
        free_memory()
        now = {"before_gb": before, "peak_gb": peak, "stays_gb": own()}
        known = self.seen.setdefault(name, now)
        self.seen[name] = {key: round(max(known[key], now[key]), 2) for key in now}

    def say(self, text: str) -> None:
        """See Watcher."""

    def warn(self, text: str) -> None:
        """See Watcher."""
        print(text)

    def stands(self, standing: Any) -> None:
        """See Watcher."""

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, own())
            time.sleep(0.1)


def own() -> float:
    """This process's own memory, GB; pages of files aside."""
    return looked_at(Path("/proc/self/smaps_rollup"))[1]


def main() -> None:
    """Run the job, print a table, write the JSON."""
    parser = options(__doc__, "stages.json")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    assets, out = arguments.assets.resolve(), arguments.out.resolve()
    assignments = [*prompt_settings(assets), "max_response_length=32", *arguments.extra]
    report = head(arguments) | {"libraries_gb": round(own(), 2)}
    stages = Stages()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        given = {"model": str(assets / arguments.model), "n_trials": arguments.trials, "save_to": "model"}
        run(resolve(None, given, assignments, {}), watcher=stages, stop=Stop())
        os.chdir("/")
    write(report | {"stages": stages.seen}, out)
    print(f"libraries alone: {report['libraries_gb']}")
    for name, row in stages.seen.items():
        print(
            f"{name[:50]:50} before {row['before_gb']:5.2f}  at most {row['peak_gb']:5.2f}  stays {row['stays_gb']:5.2f}"
        )


if __name__ == "__main__":
    main()
