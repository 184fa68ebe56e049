"""What ending a study when it has converged costs and saves, replayed on finished studies.

    python benchmarks/convergence.py RUN/study.db ... benchmarks/results/study.json ...

Each study ran all of its trials. For every `search.patience` and `search.min_gain` the replay finds the trial after which the
study would have ended, by the function that ends real ones, and compares the hypervolumes then and at the end. Nothing is
measured again. Files of benchmarks/study.py name only the fully measured trials; the others were pruned.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from common import head, options, write

from heretic.search.convergence import REFERENCE_KL, final_gain, growth
from heretic.search.hypervolume import hypervolume_history
from heretic.search.pruning import StudyHistory
from heretic.settings import SearchSettings
from heretic.storage import attributes
from heretic.storage.url import storage_url

PATIENCE = (5, 10, 15, 20, 30, 40)
MIN_GAINS = (0.001, 0.003, 0.01, 0.03)
STARTUP = 10  # trials before TPE starts in benchmarks/study.py, at least as many as its gradient search gives


@dataclass(frozen=True)
class Replay:
    """A finished study."""

    name: str
    model: str
    start: str
    startup: int  # search.n_startup_trials
    initial: int  # trials that the gradient search enqueued
    measured: list[bool]  # by finished trial: False if it was pruned
    hypervolumes: list[float]  # after each finished trial

    def end(self, patience: int, min_gain: float, *, startup: bool = True, pruned: bool = True) -> tuple[int, float]:
        """Return how many trials run, and the fraction of the final hypervolume that is lost.

        Args:
            patience: `search.patience`.
            min_gain: `search.min_gain`.
            startup: Whether trials before TPE starts are kept out of the window.
            pruned: Whether pruned trials count.
        """
        floor = self.startup if startup else 0
        search = SearchSettings(n_startup_trials=floor, patience=patience, min_gain=min_gain)
        for ran in range(max(self.initial, 1), len(self.hypervolumes) + 1):
            counted = [v for v, full in zip(self.hypervolumes[:ran], self.measured, strict=False) if full or pruned]
            if final_gain(counted, search) is not None:
                return ran, 1 - self.hypervolumes[ran - 1] / self.hypervolumes[-1]
        return len(self.hypervolumes), 0.0


def main() -> None:
    """Replay the studies and print and write the grid."""
    parser = options(__doc__, "convergence.json", assets=False)
    parser.add_argument("studies", type=Path, nargs="+", help="study.db of a run, or a file of benchmarks/study.py")
    parser.add_argument("--note", default="", help="how the studies were made")
    arguments = parser.parse_args()
    arguments.model = ""
    replays = [read(path) for path in arguments.studies]
    grid = [row(replays, *pair) for pair in itertools.product(PATIENCE, MIN_GAINS)]
    for found in grid:
        print(
            "patience {patience:>2}, min_gain {min_gain:<5}: at most {lost:.2%} lost, {ran} of {of} trials run".format(**found),
            "; counting startup trials: {lost:.2%}, {ran}".format(**found["with_startup"]),
            "; only fully measured: {lost:.2%}, {ran}".format(**found["only_measured"]),
        )  # fmt: skip
    report = head(arguments) | {"reference_kl": REFERENCE_KL, "note": arguments.note, "grid": grid}
    command = re.sub(r" --note '[^']*'", "", report["command"])
    report["command"] = re.sub(r"\S*/(\S+)/study\.db", r"RUNS/\1/study.db", command)
    report["studies"] = [
        {
            "name": r.name, "model": r.model, "start": r.start, "startup": r.startup, "initial": r.initial,
            "trials": len(r.hypervolumes), "pruned": r.measured.count(False),
            "hypervolumes": [round(v, 5) for v in r.hypervolumes],
        }
        for r in replays
    ]  # fmt: skip
    write(report, arguments.out)


def row(replays: Sequence[Replay], patience: int, min_gain: float) -> dict[str, Any]:
    """Return the trials run in all studies and the largest loss of one, by three ways of counting."""

    def over_all(**how: bool) -> dict[str, Any]:
        ends = [r.end(patience, min_gain, **how) for r in replays]
        return {"ran": sum(ran for ran, _ in ends), "lost": max(lost for _, lost in ends)}

    return {
        "patience": patience,
        "min_gain": min_gain,
        "of": sum(len(r.hypervolumes) for r in replays),
        "ends": [r.end(patience, min_gain)[0] for r in replays],
        **over_all(),
        "with_startup": over_all(startup=False),
        "only_measured": over_all(pruned=False),
    }


def read(path: Path) -> Replay:
    """Read a study from its database or from a result of benchmarks/study.py."""
    return _of_result(path) if path.suffix == ".json" else _of_database(path)


def _of_database(path: Path) -> Replay:
    url = storage_url("", path.parent)
    study = optuna.load_study(study_name=optuna.get_all_study_names(url)[0], storage=url)
    settings = attributes.settings_of(study)
    assert settings is not None
    history = StudyHistory.of(study)
    numbers, hypervolumes = growth(history, attributes.refusals_before(study))
    measured = {r.number for r in history.results}
    initial = sum(attributes.start(study, t) is not None for t in study.get_trials(deepcopy=False))
    search = settings.search
    return Replay(
        path.parent.name, Path(settings.model).name, search.start, search.n_startup_trials, initial,
        [n in measured for n in numbers], hypervolumes,
    )  # fmt: skip


def _of_result(path: Path) -> Replay:
    report = json.loads(path.read_text())
    points = {p["trial"]: (p["kl"], p["refusals"]) for p in report["measured"]}
    numbers = range(report["trials"])
    hypervolumes = hypervolume_history(
        (points.get(n, (math.inf, math.inf)) for n in numbers), (REFERENCE_KL, report["declined_before"])
    )
    measured = [n in points for n in numbers]
    return Replay(path.stem, report["model"], "gradient", STARTUP, STARTUP, measured, hypervolumes)


if __name__ == "__main__":
    main()
