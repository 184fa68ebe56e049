"""A whole study on the CPU, timed: seconds per trial by phase, time to prepare a trial, peak memory, and the front.

    python benchmarks/study.py ASSETS [--trials 30] [--out benchmarks/results/study.json]

ASSETS is a folder with a model folder and four prompt files (see benchmarks/RESULTS.md). 100 + 100 direction prompts,
50 + 50 evaluation prompts, 32 new tokens, float32. The command `heretic run` is run as a user would, in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import head, options, prompt_settings, write
from memory import watched

from heretic.runs.status import read_status
from heretic.search.pareto import Result, pareto_front, select_trial


def main() -> None:
    """Run the study, print a table, write the JSON."""
    parser = options(__doc__, "study.json")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(arguments, Path(folder))
    write(report, arguments.out)
    for key in (
        "declined_before",
        "trials",
        "left_early",
        "proxy_error",
        "seconds_total",
        "seconds_per_trial",
        "peak_gb",
        "memory",
        "chosen",
        "written",
    ):
        print(f"{key}: {report[key]}")
    for point in report["front"]:
        print(f"  {point['refusals']:>3} refusals at KL {point['kl']:.4f} (trial {point['trial']})")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run `heretic run` and read its study."""
    model = (arguments.assets / arguments.model).resolve()
    command = [
        sys.executable,
        "-m",
        "heretic",
        "run",
        str(model),
        "--trials",
        str(arguments.trials),
        "--save-to",
        "model",
    ]
    for assignment in (
        *prompt_settings(arguments.assets),
        f"max_response_length={arguments.tokens}",
        "search.n_startup_trials=10",
        "search.patience=0",
        f"seed={arguments.seed}",
        *arguments.extra,
    ):
        command += ["--set", assignment]
    total, memory = watched(command, folder, {**os.environ, "HF_HUB_OFFLINE": "1"})
    seen = read_status("", str(folder / "runs"), {}).summary
    trials = [r.scores.seconds for r in seen.results]
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    chosen = select_trial(seen.results, "fewest_refusals_under_kl", 0.1, 0)
    return head(arguments) | {
        "seed": arguments.seed,
        "trials": seen.n_complete,
        "left_early": seen.n_pruned,
        "proxy_error": seen.history.proxy_error,
        "declined_before": seen.original_refusals,
        "seconds_total": round(total, 1),
        "seconds_per_trial": {k: round(statistics.median(t[k] for t in trials), 4) for k in sorted(trials[0])},
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        "memory": memory.profile(),
        "memory_curve": memory.curve(),
        "chosen": point(chosen[0]) if chosen else None,
        "written": manifest["scores"]["written"],
        "verification": manifest["verification"],
        "front": [point(r) for r in pareto_front(seen.results)],
        "measured": [{**point(r), "refused": r.scores.refused} for r in seen.results],
    }


def point(result: Result) -> dict[str, Any]:
    """A trial on the front as plain numbers."""
    return {"trial": result.number, "refusals": result.scores.refusals, "kl": round(result.scores.divergence.mean, 5)}


if __name__ == "__main__":
    main()
