"""What `search.warm_start` brings: a study by kernels that begins with an earlier one's front, beside one that begins from nothing.

    python benchmarks/warm_start.py ASSETS [--seeds 0 1] [--first 30] [--then 20]

For every seed `heretic run` is run three times as a user would: a study of --first trials; then, with the directions of other
prompts and another seed, --then trials without and with the warm start. Told is the hypervolume of the front, as the study
measured it, after 5, 10 ... trials: the share of KL up to 0.5 and refusals up to the original's that it dominates.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROLES, head, options, prompt_settings, write
from versus_heretic import hypervolume

from heretic.search.front import Result
from heretic.status import look_at

TRAIN = (
    60  # prompts that give the directions: the first so many of each file for the first study, the next for the others
)


def main() -> None:
    """Three studies a seed; print, write the JSON."""
    parser = options(__doc__, "warm_start.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--first", type=int, default=30)
    parser.add_argument("--then", type=int, default=20)
    parser.add_argument("--evaluation", type=int, default=50, help="prompts of each kind that the studies see")
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    report: dict[str, Any] = head(arguments) | {"studies": []}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, trials, warm in (
                ("first", arguments.first, False),
                ("cold", arguments.then, False),
                ("warm", arguments.then, True),
            ):
                runs = Path(folder) / ("runs" if name != "cold" else "alone")
                study_seed = seed if name == "first" else 100 + seed
                study(arguments, runs, name, trials, study_seed, warm=warm)
                found = look_at(name, str(runs), {}).standing
                curve = {str(n): front_until(found.found, n, found.before or 0) for n in range(5, trials + 1, 5)}
                report["studies"].append({"seed": seed, "name": name, "declined": found.before, "hypervolume": curve})
                print(seed, name, curve, flush=True)
                write(report, arguments.out)


def study(arguments: Any, runs: Path, name: str, trials: int, seed: int, *, warm: bool) -> None:
    """`heretic run` in its own process."""
    part = f"train[:{TRAIN}]" if name == "first" else f"train[{TRAIN}:{2 * TRAIN}]"
    assignments = [
        *prompt_settings(arguments.assets, evaluation=arguments.evaluation),
        *(f"prompts.{role}.split={part}" for role in ROLES if role.endswith("train")),
        f"runs_dir={runs}",
        "max_response_length=32",
        "search.start=kernels",
        "search.n_startup_trials=10",
        f"search.warm_start={str(warm).lower()}",
        f"seed={seed}",
        *arguments.extra,
    ]
    command = [sys.executable, "-m", "heretic", "run", str((arguments.assets / arguments.model).resolve())]
    command += ["--run-name", name, "--trials", str(trials), "--no-menu"]
    command += [word for assignment in assignments for word in ("--set", assignment)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)


def front_until(found: list[Result], trials: int, before: int) -> float:
    """The hypervolume of the first so many trials."""
    points = [(r.scores.divergence.mean, r.scores.refusals) for r in found if r.number < trials]
    return hypervolume(points, before) or 0.0


if __name__ == "__main__":
    main()
