"""What a fully measured trial's time is spent on, by operation: PyTorch's profiler over trials of the kernels' space.

    python benchmarks/operations.py ASSETS [--trials 2] [--out benchmarks/results/operations.json]

100 + 100 direction prompts, 50 + 50 evaluation prompts, 32 tokens, float32, all savings on. Times are an operation's own, without
what it calls; operations of the model's language (moving, comparing, launching) are what is left. The profiler itself costs some.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import head, opened, options, write
from torch.profiler import ProfilerActivity, profile
from trial import drawn, run

MOST = 12  # operations that are named


def main() -> None:
    """Profile, print a table, write the JSON."""
    parser = options(__doc__, "operations.json")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        session, _ = opened(
            arguments.assets, arguments.model, [f"max_response_length={arguments.tokens}"], Path(folder)
        )
        ablations = drawn(session, arguments.trials)
        run(session, session.ladder, ablations[:1], 1)  # so that nothing is made for the first time
        began = time.perf_counter()
        run(session, session.ladder, ablations, 1)
        plain = time.perf_counter() - began
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
            run(session, session.ladder, ablations, 1)
        profiled = time.perf_counter() - began
    report = head(arguments) | {
        "threads": torch.get_num_threads(),
        "seconds_per_trial": round(plain / arguments.trials, 2),
        "seconds_per_trial_profiled": round(profiled / arguments.trials, 2),
        "operations": by_operation(seen, profiled),
    }
    write(report, arguments.out)
    print({name: report[name] for name in ("seconds_per_trial", "seconds_per_trial_profiled")})
    for row in report["operations"]:
        print(row)


def by_operation(seen: Any, seconds: float) -> list[dict[str, Any]]:
    """The dearest operations: own seconds, share of all the time, calls, and the rate of those whose arithmetic is counted."""
    found = sorted(seen.key_averages(), key=lambda one: -one.self_cpu_time_total)[:MOST]
    return [
        {
            "operation": one.key,
            "seconds": round(one.self_cpu_time_total / 1e6, 2),
            "share": round(one.self_cpu_time_total / 1e6 / seconds, 3),
            "calls": one.count,
            "gflops_per_second": round(one.flops / 1e3 / one.self_cpu_time_total, 1) if one.flops else None,
        }
        for one in found
    ]


if __name__ == "__main__":
    main()
