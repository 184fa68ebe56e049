"""Memory that runs out in every phase: batches become smaller, nothing is lost, the scores stay the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from heretic.files import sha256
from heretic.model import capture
from heretic.model.batching import Batch
from heretic.scoring import divergence, refusal_count
from tests.faults.conftest import Amount, Tally, only_full
from tests.faults.room import Room, moments
from tests.helpers.command import Ran, heretic

ARGUMENTS = ("run", "--run-name", "mine", "--set", 'search.start="gradient"', "--set", "search.gradient.weights=[0.1]",
             "--set", "search.gradient.steps=2", "--set", "batch_size=8",
             "--set", "search.gradient.second_search=false")  # fmt: skip


def values() -> list[tuple[float, ...]]:
    study = optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db")
    return [tuple(round(v, 5) for v in t.values) for t in study.trials if t.state.name == "COMPLETE"]


class Scarce:
    """Makes a function run out of memory now and then, whenever it is given more than one row."""

    def __init__(self, function: Callable[..., Any], chance: float, seed: int) -> None:
        self.function, self.chance, self.random, self.failed = function, chance, random.Random(seed), 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        batch = next((a for a in arguments if isinstance(a, Batch)), None)
        if batch is not None and len(batch.rows) > 1 and self.random.random() < self.chance:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.function(*arguments, **options)


@pytest.mark.parametrize("where", ["capture", "prefill", "decoding"])
def test_it_runs_out_in_the_middle(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    amount: Amount,
    tally: Tally,
    where: str,
) -> None:
    assert heretic(capsys, monkeypatch, *ARGUMENTS).status == 0
    wanted, failures, times = values(), 0, amount(1, 15)
    module, name = {
        "capture": (capture, "last_token_residuals"),
        "prefill": (divergence, "hidden_states"),
        "decoding": (refusal_count, "verify_draft"),
    }[where]
    for i in range(times):
        Path("runs").rename(f"runs-{i}")
        with monkeypatch.context() as scarce:
            function = Scarce(getattr(module, name), 0.3, i)
            scarce.setattr(module, name, function)
            ran = heretic(capsys, scarce, *ARGUMENTS)
        assert ran.status == 0, ran.err
        assert values() == wanted
        failures += function.failed
    assert failures, "memory never ran out"
    tally(f"out of memory during {where}", failures, "nothing")


EXPORTING = (*ARGUMENTS, "--save-to", "out")
NOTHING_LARGE, NOTHING = 2000, 0  # bytes of a tensor: too little for a batch of the tiny model, or for anything


def ended(ran: Ran) -> None:
    """Done, or stopped by one message of a few lines."""
    assert ran.status == 0 or (ran.status == 1 and ran.err.count("Error:") == 1 and len(ran.err) < 900), ran.err
    assert ran.status == 0 or "emory" in ran.err or "failed" in ran.err, ran.err


@pytest.mark.parametrize(
    ("part", "room"),
    [
        ("the study", NOTHING_LARGE),
        ("the export", NOTHING),
        pytest.param("the study", NOTHING, marks=only_full),
        pytest.param("the export", NOTHING_LARGE, marks=only_full),
    ],
)
def test_another_process_takes_the_memory(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    amount: Amount,
    tally: Tally,
    part: str,
    room: int,
) -> None:
    with Room(1 << 62) as all_of_it:
        assert heretic(capsys, monkeypatch, *ARGUMENTS).status == 0
        before = all_of_it.operations
        assert heretic(capsys, monkeypatch, *EXPORTING).status == 0
    wanted, weights = values(), sha256(Path("out/model.safetensors"))
    length = before if part == "the study" else all_of_it.operations - before
    times, failures, stopped = amount(1, 12), 0, 0
    for i, moment in enumerate(moments(length, times, room)):
        Path("out").rename(f"out-{i}")
        if part == "the study":
            Path("runs").rename(f"runs-{i}")
        with Room(room, moment, moment + 2000) as taken:
            ran = heretic(capsys, monkeypatch, *EXPORTING)
        ended(ran)
        assert Path("out").exists() == (ran.status == 0) and not list(Path().glob(".out*"))
        failures, stopped = failures + taken.failed, stopped + (ran.status != 0)
        assert heretic(capsys, monkeypatch, *EXPORTING).status == 0
        assert values() == wanted
        assert sha256(Path("out/model.safetensors")) == weights
    assert failures, "memory never ran out"
    much = "all" if room == NOTHING else "most of"
    tally(
        f"{much} the memory taken by another process at a random moment of {part}, given back later ({failures} allocations "
        f"failed; {stopped} times the run ended, the same command resumed)",
        times,
        "nothing",
    )
