"""Trials per hour for 1 to 8 workers on one study in PostgreSQL, and what a trial asks of the server.

    python benchmarks/scale_out.py [--seconds 2] [--trials 40]

The trials are simulated: a worker sleeps for as long as a trial takes, since one machine has too few cores (and GPUs) for eight
real ones. What is real: the processes, the queue, the turns, the signs of life, the server. So the figures say what sharing a study
costs, not how fast a model is. The server is started for the measurement (PostgreSQL's programs must be installed).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import cpu_name  # noqa: E402

from heretic.errors import UserError  # noqa: E402
from heretic.progress import SILENT  # noqa: E402
from heretic.scoring.divergence import Divergence  # noqa: E402
from heretic.scoring.ladder import Measured, Scores  # noqa: E402
from heretic.search.queue import finished  # noqa: E402
from heretic.search.storage import open_study  # noqa: E402
from heretic.search.study import optimise  # noqa: E402
from heretic.settings import Search, Settings  # noqa: E402
from heretic.stop import Stop  # noqa: E402

WORKERS = (1, 2, 4, 8)


class Sleeper:
    """Takes its time for a trial and measures nothing."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def together(self, before: int | None) -> int:
        """One."""
        return 1

    def starts(self) -> list[dict[str, Any]]:
        """None."""
        return []

    def draw(self, trial: Any) -> list[float]:
        """As many numbers as a trial around a walk has."""
        return [trial.suggest_float(f"p{i}", 0.5, 2.0) for i in range(6)]

    def measure(self, trials: Sequence[Any], beaten: Callable[[float, float], bool]) -> list[Measured | UserError]:
        """Sleep."""
        time.sleep(self.seconds)
        return [Scores(Divergence(sum(self.draw(t)), 0, 0, 0), int(10 * self.draw(t)[0]), 50, {}) for t in trials]


def work(url: str, name: str, trials: int, seconds: float, begin: float) -> None:
    """One worker, from a moment that all share."""
    settings = Settings(n_trials=trials, early_stopping=False, search=Search(n_startup_trials=10))
    study = open_study(url, name, {"benchmark": 1}, settings.workers)
    time.sleep(max(0.0, begin - time.time()))
    optimise(study, settings, Sleeper(seconds), watcher=SILENT, stop=Stop(), shared=True)


def measured(server: Any, workers: int, trials: int, seconds: float) -> dict[str, Any]:
    """One study with so many workers."""
    name, begin = f"scale{workers}", time.time() + 5 + 2 * workers
    study = open_study(server.url, name, {"benchmark": 1})
    before = load(server)
    arguments = [sys.executable, __file__, "--work", name, str(trials), str(seconds), str(begin)]
    environment = {**os.environ, "HERETIC_STORAGE": server.url}
    processes = [subprocess.Popen(arguments, env=environment) for _ in range(workers)]
    for process in processes:
        if process.wait():
            sys.exit("a worker failed")
    after = load(server)
    complete = [t for t in study.trials if t.datetime_start and t.datetime_complete]
    took = max(t.datetime_complete.timestamp() for t in complete) - min(t.datetime_start.timestamp() for t in complete)  # type: ignore[union-attr]
    assert finished(study) == trials == len(study.trials)
    return {
        "workers": workers,
        "trials": trials,
        "seconds_per_simulated_trial": seconds,
        "trials_per_hour": 3600 * trials / took,
        "efficiency": seconds * trials / (workers * took),
        "statements_per_trial": (after["statements"] - before["statements"]) / trials,
        "transactions_per_trial": (after["transactions"] - before["transactions"]) / trials,
        "server_ms_per_trial": (after["ms"] - before["ms"]) / trials,
    }


def load(server: Any) -> dict[str, float]:
    """What the server has done so far, those who ask here included."""
    ((statements, ms),) = server.ask("select sum(calls), sum(total_exec_time) from pg_stat_statements")
    ((transactions,),) = server.ask("select sum(xact_commit + xact_rollback) from pg_stat_database")
    return {"statements": float(statements), "ms": float(ms), "transactions": float(transactions)}


def main() -> None:
    """Measure and print."""
    from tests.postgres import server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scale_out.json")
    given = parser.parse_args()
    with server("-c shared_preload_libraries=pg_stat_statements") as running:
        running.ask("create extension pg_stat_statements")
        rows = [measured(running, n, given.trials, given.seconds) for n in WORKERS]
        version = running.ask("show server_version")[0][0]
    versions = {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("optuna", "sqlalchemy", "psycopg")},
    }
    machine = {"date": date.today().isoformat(), "postgresql": version, "cpu": cpu_name(), "versions": versions}
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps({"simulated": True, **machine, "rows": rows}, indent=2) + "\n")
    print("| workers | trials per hour | of what so many could | statements per trial | server time per trial |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['workers']} | {row['trials_per_hour']:.0f} | {100 * row['efficiency']:.0f} % "
            f"| {row['statements_per_trial']:.0f} | {row['server_ms_per_trial']:.1f} ms |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        name, trials, seconds, begin = sys.argv[2:]
        work(os.environ["HERETIC_STORAGE"], name, int(trials), float(seconds), float(begin))
    else:
        main()
