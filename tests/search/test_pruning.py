"""Stopping when beaten changes nothing about the front: a recorded study, replayed with and without."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heretic.scoring.scores import Divergence, Scores
from heretic.search.pareto import Result, pareto_front
from heretic.search.pruning import ParetoThreshold

# Every trial of a real study measured in full (`benchmarks/study.py ASSETS --set early_stopping=false`): its KL, and a 1 for
# every request it refused.
RECORDED = json.loads((Path(__file__).parent / "recorded_study.json").read_text())["trials"]


def result(number: int, kl: float, refusals: int) -> Result:
    return Result(number, {}, Scores(Divergence(kl, kl, kl, kl), refusals, 50, {}))


def replay(trials: list[tuple[float, str]], order: list[int]) -> tuple[list[Result], int]:
    """What is measured in full when requests are looked at in this order and every refusal may end the trial; and
    how many trials were stopped."""
    measured: list[Result] = []
    for number, (kl, refused) in enumerate(trials):
        bar, count = ParetoThreshold([r.point for r in measured]), 0
        beaten = bar.dominates(kl, 0)
        for request in order:
            if beaten:
                break
            if refused[request] == "1":
                count += 1
                beaten = bar.dominates(kl, count)
        if not beaten:
            measured.append(result(number, kl, count))
    return measured, len(trials) - len(measured)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_of_a_recorded_study_is_the_same_whatever_the_order(seed: int) -> None:
    trials = [(t["kl"], t["refused"]) for t in RECORDED]
    full = [result(i, kl, refused.count("1")) for i, (kl, refused) in enumerate(trials)]
    order = list(range(len(trials[0][1])))
    random.Random(seed).shuffle(order)
    measured, stopped = replay(trials, order)
    assert [(r.number, r.point) for r in pareto_front(measured)] == [(r.number, r.point) for r in pareto_front(full)]
    assert stopped >= len(trials) // 4, "the recorded study has trials that others beat"


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.1, 0.5, math.inf]), st.text("01", min_size=6, max_size=6)), max_size=12
    )
)
def test_the_front_is_the_same_with_ties_and_destroyed_models(trials: list[tuple[float, str]]) -> None:
    full = [result(i, kl, refused.count("1")) for i, (kl, refused) in enumerate(trials)]
    measured, _ = replay(trials, list(range(6)))
    assert [(r.number, r.point) for r in pareto_front(measured)] == [(r.number, r.point) for r in pareto_front(full)]


def test_only_what_is_no_worse_in_both_and_better_in_one_beats() -> None:
    bar = ParetoThreshold([(0.1, 5), (0.3, 2)])
    assert bar.dominates(0.1, 6) and bar.dominates(0.2, 5) and bar.dominates(0.3, 3) and bar.dominates(math.nan, 0)
    assert (
        not bar.dominates(0.1, 5)
        and not bar.dominates(0.09, 50)
        and not bar.dominates(0.2, 4)
        and not bar.dominates(0.5, 1)
    )
