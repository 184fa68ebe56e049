"""The memory plan against what a run really takes: `heretic preflight` and `heretic run` on the same settings, side by side.

    python benchmarks/plan.py ASSETS [--trials 4] [--set KEY=VALUE]

Compared is the plan's peak (all but the headroom) with the largest memory of the run's own that the kernel counts
(`Anonymous` in /proc/PID/smaps_rollup); pages of files, such as the mapped checkpoint, are beside it: the kernel may drop them.
Linux, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import head, options, prompt_settings, write
from memory import watched

TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def main() -> None:
    """Plan, run, print both, write the JSON."""
    parser = options(__doc__, "plan.json")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--evaluation", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], dest="extra")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = head(arguments) | measure(arguments, Path(folder))
    write(report, arguments.out)
    show(report)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The plan, then the run that it is about."""
    given = [str((arguments.assets / arguments.model).resolve())]
    assignments = [
        *prompt_settings(arguments.assets, arguments.train, arguments.evaluation),
        "max_response_length=32",
        'device_map="cpu"',
        *arguments.extra,
    ]
    for assignment in assignments:
        given += ["--set", assignment]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    preflight = [sys.executable, "-m", "heretic", "preflight", *given, "--json"]
    planned = json.loads(
        subprocess.run(preflight, cwd=folder, env=environment, capture_output=True, text=True, check=False).stdout
    )
    command = [sys.executable, "-m", "heretic", "run", *given, "--trials", str(arguments.trials), "--save-to", "model"]
    seconds, memory = watched(command, folder, environment)
    (load,) = planned["plan"]["loads"]
    measured = memory.profile()
    peak = load["peak"] / 1e9
    return {
        "settings": arguments.extra,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "trials": arguments.trials,
        "batch_size": planned["plan"]["batch_size"],
        "dtype": planned["plan"]["dtype"],
        "planned_gb": {part: round(load[part] / 1e9, 3) for part in load if part not in ("device", "layers", "fits")},
        "planned_peak_gb": round(peak, 2),
        "measured": measured,
        "apart": round(peak / measured["anonymous_peak_gb"] - 1, 3),
        "run_seconds": round(seconds, 1),
        "curve": memory.curve(),
        "stages": stages(next((folder / "runs").glob("*/run.log"))),
    }


def stages(log: Path) -> list[str]:
    """The lines of run.log, without the day, so that the curve can be read beside them."""
    return [line[11:].rstrip()[:100] for line in log.read_text(encoding="utf-8").splitlines() if TIME.match(line)]


def show(report: dict[str, Any]) -> None:
    """Print the two side by side."""
    rows: Sequence[tuple[str, Any]] = [
        ("planned, by part (GB)", {k: v for k, v in report["planned_gb"].items() if v}),
        ("planned peak (GB)", report["planned_peak_gb"]),
        ("measured (GB)", report["measured"]),
        ("plan / measured - 1", f"{report['apart']:+.1%}"),
    ]
    for name, value in rows:
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
