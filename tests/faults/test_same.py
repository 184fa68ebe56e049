"""The same seed gives the same study, bit for bit: again, resumed after every trial, and with several trials to a pass."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from heretic.files import read_tensors, sha256
from tests.faults.conftest import Amount, Tally
from tests.helpers.command import start

RUN = ("run", "--run-name", "mine", "--set", 'search.start="gradient"', "--set", "search.gradient.weights=[0.1]",
       "--set", "search.gradient.steps=2", "--set", "search.gradient.second_search=false")  # fmt: skip


def do(*arguments: str) -> None:
    output, _ = (process := start(*RUN, *arguments)).communicate(timeout=120)
    assert process.returncode == 0, output


def study() -> list[tuple[object, ...]]:
    """Numbers, parameters and all that was measured of the trials, to the last bit; and what they rest on."""
    found = optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db")
    done = [t for t in found.trials if t.state.name == "COMPLETE"]
    scores = [t.user_attrs["heretic:scores"] for t in done]
    trials = [(t.number, t.params, t.values, s["divergence"], s["refused"]) for t, s in zip(done, scores, strict=True)]
    files = ("directions", "baseline", "gradient_path")
    return [*trials, *((n, read_tensors(Path(f"runs/mine/{n}.safetensors"))[1]["sha256"]) for n in files)]


def test_again_and_resumed(config: Path, amount: Amount, tally: Tally) -> None:
    trials = amount(4, 20)
    do("--trials", str(trials), "--save-to", "out")
    wanted, weights = study(), sha256(Path("out/model.safetensors"))
    for i in range(amount(0, 3)):
        Path("runs").rename(f"again-{i}")
        Path("out").rename(f"out-{i}")
        do("--trials", str(trials), "--save-to", "out")
        assert study() == wanted and sha256(Path("out/model.safetensors")) == weights
    Path("runs").rename("whole")
    stops = range(1, trials + 1) if amount(0, 1) else (2, trials)
    for so_far in stops:
        do("--trials", str(so_far))
    assert study() == wanted, "a study that was stopped and resumed is another one"
    tally(f"a study of {trials} trials made again, bit for bit", amount(0, 3), "nothing")
    tally(f"a study of {trials} trials stopped and resumed, bit for bit", len(stops), "nothing")


def test_several_trials_to_a_pass(config: Path, amount: Amount, tally: Tally) -> None:
    """While trials are drawn at random they are the same; sums of floating-point numbers in another order differ in the last
    bits. Afterwards a trial that is drawn before its neighbors are told is another trial."""
    do("--trials", "8", "--set", "search.n_startup_trials=8", "--set", "trials_per_batch=1")
    alone = study()
    Path("runs").rename("alone")
    for together in (2, 4)[: amount(1, 2)]:
        do("--trials", "8", "--set", "search.n_startup_trials=8", "--set", f"trials_per_batch={together}")
        shared = study()
        for one, other in zip(alone[:8], shared[:8], strict=True):
            assert one[0] == other[0] and one[1] == other[1] and one[4] == other[4], "parameters, refusals, bit for bit"
            assert one[3] == pytest.approx(other[3], abs=1e-5)
        assert alone[8:] == shared[8:]
        tally(
            f"8 trials one by one and {together} to a pass: parameters and refusals the same, KL within 1e-5",
            1,
            "nothing",
        )
        Path("runs").rename(f"together-{together}")
