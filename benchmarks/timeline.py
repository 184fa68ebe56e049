"""How long a study of 0.5B to 70B would take on cards that are not here: launch logs replayed with the rates of data sheets.

    python benchmarks/timeline.py                 # simulate everything, and calibrate on this machine's CPU
    python benchmarks/timeline.py --only ways     # compare ways to use four cards, and keep the rest of the report
    python benchmarks/timeline.py --launch 16     # with 16 us of the host for each launch

A simulation, not a measurement. heretic's own passes run over models that exist only as shapes (study_log.py), and every card works
through its launches as a queue (card_queue.py). The calibration predicts two passes of a small model on the CPU and measures them.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from calibration import calibrate
from card_queue import A100, DEFAULTS, H100, RTX_4090, Assumptions, Card, Timeline
from common import head, options, write
from launch_log import Section
from sizes import EVALUATION, SHAPES, Shape, blocks_of, planned
from study_log import DECIDED, PROMPT, STEPS_LOGGED, TOKENS, gradient_log, placed, residuals_log, trial_log

from heretic.model.meta_model import meta_model
from heretic.planning import pass_memory
from heretic.planning.memory_plan import MemoryPlan
from heretic.planning.model_dims import ModelDims
from heretic.session.caching import MIN_SPEEDUP
from heretic.settings import Settings

# Machine for the planner, and its cards.
MACHINES = (
    ("1x24GiB", (RTX_4090,)), ("2x24GiB", (RTX_4090,) * 2), ("4x24GiB", (RTX_4090,) * 4),
    ("1x80GiB", (A100,)), ("2x80GiB", (A100,) * 2), ("1x80GiB", (H100,)), ("2x80GiB", (H100,) * 2),
)  # fmt: skip
TRIALS, TRAINING = 200, 400  # trials; training prompts of each kind
DISK = 2e9  # bytes/s of a good NVMe disk: an assumption
MINED, MINED_TOKENS = 6, 16  # times that the gradient search decodes its training prompts; tokens of such an answer
TRIALS_AT_ONCE = (1, 2, 4)
LAUNCHES = (4e-6, 8e-6, 16e-6)  # seconds of the host a launch, beside the default


@dataclass(frozen=True)
class Setup:
    """A model on a machine."""

    shape: Shape
    cards: tuple[Card, ...]  # that hold blocks
    blocks: tuple[int, ...]  # on each of them
    quantization: str = "none"


@dataclass(frozen=True)
class Way:
    """How trials are measured together."""

    trials: int  # in flight
    groups: int = 0  # micro-batches in turn, at most; 0: as heretic does it


@dataclass(frozen=True)
class Measured:
    """What a timeline gives for trials in flight."""

    seconds: float  # a trial
    parts: dict[str, float]  # seconds a trial
    utilization: list[float]  # by card, over the whole trial
    decoding_utilization: list[float]
    tokens_per_second: float  # while decoding
    launches_per_token_step: int  # of all micro-batches
    waits_per_token_step: float


@cache
def trial_sections(setup: Setup, way: Way, batch: int) -> dict[str, Section]:
    """The log of trials that share their passes."""
    rows = way.trials * EVALUATION
    with placed(setup.shape, setup.blocks, quantization=setup.quantization, groups=way.groups) as model:
        return trial_log(model, rows, way.trials, batch)


def measure(setup: Setup, way: Way, batch: int, assumptions: Assumptions) -> Measured:
    """Measure trials in flight: operators trial by trial, then KL, drafts and decoding."""
    sections = trial_sections(setup, way, min(batch, way.trials * EVALUATION))
    parts, busy = {}, [0.0] * len(setup.cards)
    decoding: list[float] = []
    for name, scale in (
        ("operators", way.trials),
        ("KL", 1),
        ("drafts", 1),
        ("decoding", (TOKENS - 1) / STEPS_LOGGED),
    ):
        line = Timeline(setup.cards, assumptions)
        line.replay(sections[name].events)
        parts[name] = line.end * scale / way.trials
        busy = [before + now * scale / way.trials for before, now in zip(busy, line.busy, strict=True)]
        if name == "decoding":
            decoding = [now / line.end for now in line.busy]
    seconds = sum(parts.values())
    decoded = EVALUATION * (1 - 1 / DECIDED) * (TOKENS - 1)
    return Measured(
        seconds,
        parts,
        [each / seconds for each in busy],
        decoding,
        decoded / parts["decoding"],
        sections["decoding"].launches // STEPS_LOGGED,
        sections["decoding"].waits / STEPS_LOGGED,
    )


def tuned(setup: Setup, batch: int, assumptions: Assumptions, groups: int = 0) -> Way:
    """Return how many trials heretic puts into a pass: doubled while decoding is faster by a fifth and the rows fit."""
    way = Way(1, groups)
    rate = measure(setup, way, batch, assumptions).tokens_per_second
    while 2 * way.trials * EVALUATION <= batch:
        doubled = replace(way, trials=2 * way.trials)
        found = measure(setup, doubled, batch, assumptions).tokens_per_second
        if found < MIN_SPEEDUP * rate:
            break
        way, rate = doubled, found
    return way


def rows_with_gradients(setup: Setup, plan: MemoryPlan, checkpoint: Any) -> tuple[int, bool]:
    """As heretic decides: rows of a pass with gradients, and whether activations are computed again."""
    dims = ModelDims.of(checkpoint.config, meta_model(checkpoint, "bfloat16"))
    free = min(load.device.free - load.weights for load in plan.loads if load.weights)
    budget = int(pass_memory.SHARE_FOR_GRADIENTS * free)
    return pass_memory.rows_with_gradients(dims, budget, PROMPT + 4, PROMPT + 4, on_cpu=False)


@cache
def gradient_step(setup: Setup, rows: int, recompute: bool, groups: int, assumptions: Assumptions) -> float:
    """Seconds of a step of the gradient search: by the difference between one and two blocks on each card."""
    prompts, found = Settings(model="-").search.gradient.batch, []
    for most in (1, 2):
        with placed(setup.shape, setup.blocks, quantization=setup.quantization, most=most, groups=groups) as model:
            section = gradient_log(model, prompts, min(rows, prompts), recompute=recompute)
        line = Timeline(setup.cards, assumptions)
        line.replay(section.events)
        found.append(line.end)
    cards = len(setup.cards)
    return found[0] + (found[1] - found[0]) * (setup.shape.blocks - cards) / cards


def study(setup: Setup, plan: MemoryPlan, checkpoint: Any, way: Way, assumptions: Assumptions) -> dict[str, Any]:
    """Seconds of the parts of a study; every layer edited, no trial pruned, no download and no export."""
    gradient, batch = Settings(model="-").search.gradient, plan.batch_size
    alone = measure(setup, replace(way, trials=1), batch, assumptions)
    trial = measure(setup, way, batch, assumptions)
    rows = min(batch, TRAINING)
    with placed(setup.shape, setup.blocks, quantization=setup.quantization, groups=way.groups) as model:
        residuals = residuals_log(model, rows)
    line = Timeline(setup.cards, assumptions)
    line.replay(residuals.events)
    step = gradient_step(setup, *rows_with_gradients(setup, plan, checkpoint), way.groups, assumptions)
    mined = alone.parts["drafts"] + alone.parts["decoding"] * MINED_TOKENS / TOKENS
    parts = {
        "loading": plan.weights / DISK,
        "baseline": alone.seconds - alone.parts["operators"],
        "residuals": line.end * 2 * TRAINING / rows,
        "gradient search": step * gradient.steps * len(gradient.weights)
        + mined * gradient.prompts / EVALUATION * MINED,
        "trials": TRIALS * trial.seconds,
    }
    launched_at_once = measure(setup, way, batch, replace(assumptions, launch=0)).parts["decoding"]
    return {
        "parts": parts, "seconds": sum(parts.values()), "gradient_step": step, "way": asdict(way), "trial": asdict(trial),
        "trial_alone": asdict(alone),
        "decoding_launches": TRIALS * (trial.parts["decoding"] - launched_at_once),  # seconds; the most that CUDA graphs could save
    }  # fmt: skip


def cache_per_card(shape: Shape, cards: int, rows: int) -> float:
    """Bytes of keys and values of so many rows at the end of their answers, on each card."""
    return 2 * 2 * shape.blocks * shape.key_heads * shape.head * rows * (PROMPT + TOKENS) / cards


def studies(assumptions: Assumptions) -> list[dict[str, Any]]:
    """Simulate a study of every size on every machine."""
    found: list[dict[str, Any]] = []
    known: dict[
        Setup, dict[str, Any]
    ] = {}  # a model that fits on one card takes as long on a machine with more of them
    for size in SHAPES:
        for machine, cards in MACHINES:
            entry: dict[str, Any] = {"size": size, "cards": f"{len(cards)}x {cards[0].name}", "machine": machine}
            if plan := planned(SHAPES[size], machine):
                name, memory, checkpoint = plan
                blocks = tuple(blocks_of(memory, SHAPES[size]))
                setup = Setup(SHAPES[size], cards[: len(blocks)], blocks, name)
                entry |= {"quantization": name, "batch": memory.batch_size, "blocks": blocks}
                if setup not in known:
                    way = tuned(setup, memory.batch_size, assumptions)
                    known[setup] = study(setup, memory, checkpoint, way, assumptions)
                entry |= known[setup]
            found.append(entry)
            print(size, entry["cards"], entry.get("seconds"), flush=True)
    return found


def four_cards() -> tuple[Setup, MemoryPlan, Any]:
    """The 32B model on four RTX 4090 as heretic places it."""
    plan = planned(SHAPES["32B"], "4x24GiB")
    assert plan is not None
    return Setup(SHAPES["32B"], (RTX_4090,) * 4, tuple(blocks_of(plan[1], SHAPES["32B"]))), plan[1], plan[2]


def ways(assumptions: Assumptions) -> dict[str, Any]:
    """Compare ways to use four cards for a 32B model: one batch at a time, or micro-batches in turn.

    Throughput is relative to one busy card: one that could hold the whole model, with one trial in a pass, or with the number of
    trials that is best for it.
    """
    four, memory, checkpoint = four_cards()
    shape, planned_rows = four.shape, memory.batch_size
    one = Setup(shape, (RTX_4090,), (shape.blocks,))
    busy = {n: measure(one, Way(n), n * EVALUATION, assumptions) for n in TRIALS_AT_ONCE}
    rows = []
    for trials in TRIALS_AT_ONCE:
        batch = max(planned_rows, trials * EVALUATION)  # beyond the plan's choice it is the setting `batch_size`
        for kind, groups in (("one batch at a time", 1), ("in turn", 0)):
            way = Way(trials, groups)
            found = measure(four, way, batch, assumptions)
            rows.append({
                "kind": kind, **asdict(way), **asdict(found),
                "mean_utilization": sum(found.utilization) / len(found.utilization),
                "relative": busy[1].seconds / found.seconds,
                "relative_to_best": min(b.seconds for b in busy.values()) / found.seconds,
                "relative_decoding": found.tokens_per_second / busy[1].tokens_per_second,
                "relative_decoding_to_best": found.tokens_per_second / max(b.tokens_per_second for b in busy.values()),
            })  # fmt: skip
    studied = {}
    for name, groups in (("one batch at a time", 1), ("in turn", 0)):
        way = tuned(four, planned_rows, assumptions, groups)
        studied[name] = study(four, memory, checkpoint, way, assumptions)
    return {
        "busy_card": {n: asdict(each) for n, each in busy.items()},
        "rows": rows,
        "batch": planned_rows,
        "studies": studied,
        "cache_gib_per_card": {n: cache_per_card(shape, 4, n * EVALUATION) / 2**30 for n in TRIALS_AT_ONCE},
        "free_gib": min(load.device.free - load.weights for load in memory.loads) / 2**30,
    }


def host_times(assumptions: Assumptions) -> list[dict[str, float]]:
    """Seconds of a trial of the 32B model on four cards, two in one batch and four in turn, for other times of a launch."""
    four, found = four_cards()[0], []
    for launch in LAUNCHES:
        changed = replace(assumptions, launch=launch)
        one, turn = (measure(four, way, way.trials * EVALUATION, changed).seconds for way in (Way(2, 1), Way(4)))
        found.append({"launch": launch, "one_batch": one, "in_turn": turn})
    return found


def rounded(value: Any) -> Any:
    """Round the numbers of a report to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    """Simulate, calibrate, and write the report."""
    parser = options(__doc__, "timeline.json", assets=False)
    parser.add_argument("--launch", type=float, default=1e6 * DEFAULTS.launch, help="microseconds of the host a launch")
    parser.add_argument("--only", choices=("calibration", "ways", "host_times", "studies"), help="of the report")
    arguments: argparse.Namespace = parser.parse_args()
    arguments.model = "shapes"
    logging.disable(logging.WARNING)  # accelerate warns about every GPU that is not here
    assumptions = replace(DEFAULTS, launch=arguments.launch / 1e6)
    parts: dict[str, Callable[[], Any]] = {
        "calibration": calibrate,
        "ways": lambda: ways(assumptions),
        "host_times": lambda: host_times(assumptions),
        "studies": lambda: studies(assumptions),
    }
    made = head(arguments)
    if arguments.only:
        report = json.loads(arguments.out.read_text())
    else:
        report = {
            **made,
            "simulated": True,
            "assumptions": asdict(assumptions),
            "cards": [asdict(card) for card in (RTX_4090, A100, H100)],
        }
    for name in [arguments.only] if arguments.only else list(parts):
        report[name] = parts[name]()
        report.setdefault("made", {})[name] = {"command": made["command"], "date": made["date"]}
        write(rounded(report), arguments.out)


if __name__ == "__main__":
    main()
