"""What a run loses beside busy processes: OpenMP threads that spin while they wait against threads that sleep.

    python benchmarks/busy_neighbors.py [--repeats 3] [--quick]

Two workloads on all cores, each in a process of its own beside none, one and two busy PyTorch processes of one thread: a step of
the gradient search (forward and backward pass through operators on a random model of SmolLM2-135M's shape: many small operations),
and one large matrix product (2048 x 4096 x 4096). The ways of waiting take turns. `passive` is what `heretic` sets, `default` is
PyTorch's.
Results: benchmarks/results/busy_neighbors.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common import head, options, write

from heretic.machine.threads import PASSIVE_WAITING

NEIGHBORS = (0, 1, 2)
WAITING: dict[str, dict[str, str]] = {"default": {}, "passive": PASSIVE_WAITING}
SHAPE = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)
ROWS, TOKENS = 16, 40
PRODUCT = (2048, 4096, 4096)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = options(__doc__, "busy_neighbors.json", assets=False)
    parser.add_argument(
        "--repeats", type=int, default=3, help="processes for each workload, number of neighbors and way of waiting"
    )
    parser.add_argument("--quick", action="store_true", help="one repeat of two steps")
    parser.add_argument("--work", choices=("gradient", "product", "neighbor"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = "random, of SmolLM2-135M's shape"
    if arguments.work:
        {"gradient": gradient, "product": product, "neighbor": neighbor}[arguments.work](arguments.steps)
        return
    steps, repeats = (2, 1) if arguments.quick else (arguments.steps, arguments.repeats)
    rows: list[dict[str, Any]] = []
    for work in ("gradient", "product"):
        for count in NEIGHBORS:
            seconds: dict[str, list[float]] = {way: [] for way in WAITING}
            with neighbors(count):
                for _ in range(repeats):
                    for way in WAITING:  # in turn, so that what else the machine does hurts all
                        seconds[way] += timed(work, way, steps if work == "gradient" else 10 * steps)
            for way, found in seconds.items():
                rows.append({"work": work, "neighbors": count, "waiting": way, "seconds": found})
    print(f"{'work':10}{'neighbors':>10}{'waiting':>10}{'median s':>10}{'least':>10}{'most':>10}")
    for row in rows:
        measured: list[float] = row["seconds"]
        told = "".join(f"{number:10.3f}" for number in (statistics.median(measured), min(measured), max(measured)))
        print(f"{row['work']:10}{row['neighbors']:>10}{row['waiting']:>10}{told}")
    write(
        {**head(arguments), "shape": SHAPE, "rows": ROWS, "tokens": TOKENS, "product": PRODUCT, "results": rows},
        arguments.out,
    )


def environment(way: str) -> dict[str, str]:
    """The environment of a measured process."""
    kept = {k: v for k, v in os.environ.items() if k not in (*PASSIVE_WAITING, "OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    return kept | WAITING[way]


def timed(work: str, way: str, steps: int) -> list[float]:
    """Seconds of every step, as a process of its own tells them."""
    command = [sys.executable, __file__, "--work", work, "--steps", str(steps)]
    done = subprocess.run(command, env=environment(way), capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    """So many busy processes of one thread each."""
    command = [sys.executable, __file__, "--work", "neighbor"]
    started = [
        subprocess.Popen(
            command, env=environment("default") | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def steps_of(step: Any, steps: int) -> None:
    """Print the seconds of every step but the first, which warms up."""
    step()
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    print(json.dumps(found))


def gradient(steps: int) -> None:
    """A step of the gradient search: forward and backward through operators at every writer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from heretic.ablation.ablation import Ablation, Workbench
    from heretic.ablation.attach import attach
    from heretic.ablation.directions import Directions
    from heretic.model.anatomy import dissect

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval().requires_grad_(False)  # type: ignore[arg-type]
    anatomy, layers = dissect(model), SHAPE["num_hidden_layers"]
    directions = Directions(torch.nn.functional.normalize(torch.randn(layers, SHAPE["hidden_size"]), dim=-1))
    workbench = Workbench.prepare(directions, anatomy.writers, "norm_preserving")
    strengths = {c: torch.full((layers,), 0.5, requires_grad=True) for c in anatomy.components}
    ids = torch.randint(5, 1000, (ROWS, TOKENS))

    def step() -> None:
        with attach(anatomy.writers, workbench.operators(Ablation(strengths), zeros_from=0)):
            hidden = model.model(input_ids=ids).last_hidden_state[:, -1]
        torch.autograd.grad(model.lm_head(hidden).log_softmax(-1)[:, 0].mean(), list(strengths.values()))

    steps_of(step, steps)


def product(steps: int) -> None:
    """A large matrix product."""
    import torch

    rows, inner, columns = PRODUCT
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    steps_of(lambda: a @ b, steps)


def neighbor(_: int) -> None:
    """A busy PyTorch process, until it is killed."""
    import torch

    a = torch.randn(512, 512)
    print("begun", flush=True)
    while True:
        a = torch.tanh(a @ a)


if __name__ == "__main__":
    main()
