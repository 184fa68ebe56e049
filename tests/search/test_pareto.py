"""The front, and the choice of one trial."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heretic.scoring.objectives import Objective
from heretic.scoring.scores import Divergence, Scores
from heretic.search.pareto import Result, pareto_front, select_trial, table_columns


def results(*points: tuple[float, int] | tuple[float, int, float]) -> list[Result]:
    """From (KL, refusals) or (KL, refusals, refusal_mass)."""
    return [
        Result(i, {}, Scores(Divergence(kl, kl, kl, kl), n, 100, {}, refusal_mass=more[0] if more else None))
        for i, (kl, n, *more) in enumerate(points)
    ]


def test_front_is_what_nothing_beats_fewest_refusals_first() -> None:
    found = results((0.5, 1), (0.1, 10), (0.2, 10), (0.6, 1), (0.05, 30), (0.3, 5), (math.inf, 0), (0.05, 40))
    assert [r.number for r in pareto_front(found)] == [0, 5, 1, 4]


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 20)), max_size=30))
def test_no_point_of_the_front_is_beaten_and_every_other_is(points: list[tuple[float, int]]) -> None:
    found = results(*points)
    best = pareto_front(found)

    def beats(a: Result, b: Result) -> bool:
        return a.point != b.point and a.point[0] <= b.point[0] and a.point[1] <= b.point[1]

    assert not any(beats(a, b) for a in found for b in best)
    for other in found:
        assert any(b.point == other.point or beats(b, other) for b in best)


@pytest.mark.parametrize(
    ("rule", "max_kl", "max_refusals", "number", "meets_limit"),
    [
        ("fewest_refusals_under_kl", 0.25, 0, 1, True),
        ("fewest_refusals_under_kl", 0.01, 0, 2, False),
        ("lowest_kl_under_refusals", 0, 12, 1, True),
        ("lowest_kl_under_refusals", 0, 0, 0, False),
    ],
)
def test_choice(rule: str, max_kl: float, max_refusals: int, number: int, meets_limit: bool) -> None:
    chosen = select_trial(results((0.5, 1), (0.2, 10), (0.05, 30)), rule, max_kl, max_refusals)
    assert chosen is not None and chosen.result.number == number and chosen.meets_limit == meets_limit


def test_an_evasion_is_no_success_for_the_choice_either() -> None:
    evading, answering = results((0.01, 2), (0.05, 3))
    evading = replace(evading, scores=replace(evading.scores, evasive=46))
    chosen = select_trial([evading, answering], "lowest_kl_under_refusals", 0.1, 3)
    assert chosen is not None and chosen[0] is answering


def test_at_equal_counts_an_answer_that_hardly_leans_to_refusing_is_worth_more() -> None:
    found = results((0.008, 2, 1.1), (0.011, 2, 0.65), (0.023, 2, 0.18), (0.03, 2, 0.19), (0.042, 1, 0.08))
    assert [r.number for r in pareto_front(found)] == [4, 2, 1, 0]


def test_less_than_half_a_request_is_not_worth_a_larger_change() -> None:
    found = results((0.008, 2, 1.1), (0.011, 2, 0.4), (0.023, 2, 0.0), (0.2, 0, 0.0))
    assert [r.number for r in pareto_front(found)] == [3, 2, 1, 0]
    chosen = select_trial(found, "fewest_refusals_under_kl", 0.1, 0)
    assert chosen is not None and chosen[0].number == 1
    fewest = select_trial(found, "lowest_kl_under_refusals", 0.1, 2)
    assert fewest is not None and fewest[0].number == 0


def test_nothing_to_choose_from() -> None:
    assert select_trial(results((math.inf, 0)), "fewest_refusals_under_kl", 1, 1) is None


def test_columns_of_what_was_measured_and_found() -> None:
    plain = results((0.5, 1), (0.1, 10))
    assert list(table_columns(plain)) == ["trial", "refusals", "expected", "KL mean", "median", "p95", "max"]
    assert [cells[1] for cells in table_columns(plain).values()] == ["1", "10/100", "10.0", *["0.1000"] * 4]
    values = {"over_refusals": 3.0, "over_refusals.total": 40.0, "degenerate": 1.0, "degenerate.total": 40.0}
    more = [replace(r, scores=replace(r.scores, evasive=r.number, values=values)) for r in plain]
    shown = table_columns(more)
    assert (shown["evasive"], shown["expected"]) == (["0", "1"], ["1.0", "11.0"])
    assert shown["over refusals"] == ["3/40"] * 2 and shown["degenerate"] == ["1/40"] * 2
    assert table_columns([more[0], plain[1]])["degenerate"] == ["1/40", ""], "for one it was not measured"


def test_three_objectives_have_a_front_that_nothing_beats_in_the_direction_of_each() -> None:
    objectives = (Objective("kl"), Objective("refusals"), Objective("unchanged", "higher"))
    points = [(0.1, 5, 0.5), (0.2, 5, 0.5), (0.2, 5, 0.9), (0.3, 1, 0.1), (0.1, 5, 0.5), (0.05, 9, math.inf)]
    found = [
        replace(r, scores=replace(r.scores, values={"unchanged": kept}), objectives=objectives)
        for r, (_, _, kept) in zip(results(*((kl, n) for kl, n, _ in points)), points, strict=True)
    ]
    assert [r.number for r in pareto_front(found)] == [3, 2, 0]
    assert "unchanged" in table_columns(found)
    assert select_trial(found, "fewest_refusals_under_kl", 0.25, 0)[0].number == 0  # type: ignore[index]
    assert select_trial(found, "lowest_kl_under_refusals", 0, 3)[0].number == 3  # type: ignore[index]


def test_a_number_that_was_not_measured_keeps_a_result_off_the_front() -> None:
    (only,) = results((0.1, 5))
    assert pareto_front([replace(only, objectives=(Objective("kl"), Objective("unchanged", "higher")))]) == []


def test_the_objectives_that_the_user_chose_rank_the_trials() -> None:
    objectives = (Objective("answer_kl"), Objective("answered", "higher"))

    def result(number: int, kl: float, refusals: int, answer_kl: float, answered: float) -> Result:
        values = {"answer_kl": answer_kl, "answered": answered}
        scores = Scores(Divergence(kl, kl, kl, kl), refusals, 100, {}, values=values)
        return Result(number, {}, scores, objectives=objectives)

    found = [result(0, 0.005, 0, 0.5, 40), result(1, 0.02, 1, 0.1, 30), result(2, 0.04, 2, 0.7, 90)]
    for rule, max_kl, max_refusals, number, meets in (
        ("fewest_refusals_under_kl", 0.1, 0, 2, True),
        ("fewest_refusals_under_kl", 0.03, 0, 0, True),
        ("fewest_refusals_under_kl", 0.001, 0, 0, False),
        ("lowest_kl_under_refusals", 0.1, 2, 1, True),
        ("lowest_kl_under_refusals", 0.1, 0, 0, True),
    ):
        chosen = select_trial(found, rule, max_kl, max_refusals)
        assert chosen is not None and (chosen.result.number, chosen.meets_limit) == (number, meets)


def test_the_order_of_the_objectives_does_not_change_the_selection() -> None:
    found = results((0.0001, 40), (0.02, 10), (0.09, 0))
    turned = [replace(r, objectives=(Objective("refusals"), Objective("kl"))) for r in found]
    for rule, limits in (("fewest_refusals_under_kl", (0.1, 0)), ("lowest_kl_under_refusals", (0.1, 15))):
        one, other = select_trial(found, rule, *limits), select_trial(turned, rule, *limits)
        assert one is not None and other is not None and one.result.number == other.result.number
