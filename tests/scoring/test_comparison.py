"""Differences between the original and an ablated model, with their standard error."""

from __future__ import annotations

import math

import pytest

from heretic.scoring.comparison import Comparison, compare, number_text, paired_error, values_text
from heretic.scoring.scorers.harmless_answers import OverRefusals
from heretic.scoring.scorers.scorer import Measurement
from heretic.scoring.scorers.unchanged import Unchanged


def test_the_standard_error_is_that_of_paired_differences() -> None:
    assert paired_error([1, 0, 1, 1], [1, 1, 0, 0]) == pytest.approx(0.9574 / 2, rel=1e-3)
    assert paired_error([1.0], [0.0]) is None and paired_error([1, 2], [1]) is None
    assert paired_error([0, 0], [1, math.inf]) is None


def test_value_and_details_are_compared_and_survive_json() -> None:
    scorer = Unchanged()
    value, detail = compare(
        scorer, Measurement.mean_of([1, 1], {"median": 1}), Measurement.mean_of([0, 1], {"median": math.inf})
    )
    assert (value.name, value.difference, value.error) == ("unchanged", -0.5, 0.5)
    assert (detail.name, detail.error) == ("unchanged.median", None)
    assert value.difference_text == "-0.5 ± 0.5" and detail.difference_text == ""
    for one in (value, detail):
        assert Comparison.from_dict(one.as_dict()) == one
    with pytest.raises(KeyError):
        Comparison.from_dict({})


def test_a_total_belongs_to_its_count() -> None:
    (count,) = compare(OverRefusals(), Measurement.count_of([True, False, True]), Measurement.count_of([False] * 3))
    assert (count.name, count.original, count.ablated, count.total, count.error) == ("over_refusals", 2, 0, 3, None)
    assert Comparison.from_dict(count.as_dict()) == count
    assert values_text({"x": 2.0, "x.total": 3.0, "y": 0.5}) == {"x": "2/3", "y": "0.5"}


def test_counts_are_shown_without_decimals() -> None:
    assert [number_text(n) for n in (3.0, 0.123456, None, math.inf, 12345678.0)] == [
        "3",
        "0.1235",
        "",
        "inf",
        "1.235e+07",
    ]
