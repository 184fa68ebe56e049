"""Figures are what plotly takes: its own schema refuses what it does not know."""

from __future__ import annotations

import math

import pytest
from plotly import graph_objects

from heretic.pipeline.run import Outcome
from heretic.report import figures
from heretic.report.geometry_figures import geometry_figures, projections
from tests.helpers.summaries import study_summary


def accepted(figure: figures.Figure) -> graph_objects.Figure:
    """Raises ValueError where a name or a value is not of plotly's schema."""
    return graph_objects.Figure(figure)


def test_all_figures_are_valid(made: Outcome) -> None:
    summary = study_summary()
    accepted(figures.of_front(summary.history, 2, 44))
    accepted(figures.of_progress([0, 1, 5], [0.1, 0.2, 0.2]))
    accepted(figures.of_strengths({"attention": (0.0, 1.0), "mlp": (0.5, 0.25)}))
    accepted(figures.of_requests([("original", "0110"), ("trial 3", "1000")], "0110"))
    accepted(figures.of_importances({"to reach the front": {"a": 0.7, "b": 0.3}, "for few refusals": {"b": 1.0}}))
    accepted(figures.of_phases({"Loading <b>x</b>": 3.0, "Trials": 8.0}))
    geometry = made.folder.load_geometry()
    assert geometry is not None
    for figure in [*geometry_figures(geometry).values(), *(f for _, f in projections(geometry))]:
        accepted(figure)


def test_the_front_holds_every_trial_that_has_a_place() -> None:
    summary = study_summary()
    figure = accepted(figures.of_front(summary.history, summary.best[0].number if summary.best else None, 44))
    by_name = {trace.name: trace for trace in figure.data}
    assert len(by_name["Pareto front"].x) == 4 and len(by_name["measured"].x) == 2  # and one destroyed the model
    assert by_name["chosen"].y == (12,)


@pytest.mark.parametrize("values", [[0.0], [0.01], [0.0, 1e-9, 0.5, 3.0], [1.0] * 4])
def test_every_prompt_is_in_one_bar(values: list[float]) -> None:
    figure = accepted(figures.of_divergences(values, {"mean": sum(values) / len(values)}))
    assert sum(figure.data[0].y) == len(values)
    assert all(math.isfinite(x) for x in figure.data[0].x)


def test_kinds_of_requests() -> None:
    figure = accepted(figures.of_requests([("original", "0110"), ("trial 3", "1010")], "0110"))
    assert [list(row) for row in figure.data[0].z] == [[0, 1, 1, 0], [2, 0, 1, 0]]
    figure = accepted(figures.of_requests([("trial 3", "2102")], "0110"))
    assert [list(row) for row in figure.data[0].z] == [[3, 1, 0, 3]] and "neither" in figure.data[0].text[0][0]


def test_text_is_no_markup() -> None:
    assert figures.escaped("<a href='x'>&") == "&lt;a href='x'&gt;&amp;"
    assert "<b>" not in str(figures.of_phases({"Loading <b>x</b>": 3.0}))


def test_numbers_that_round_to_infinity_are_left_out() -> None:
    assert figures.short(0.123456) == 0.1235
    assert [figures.short(n) for n in (1.7975000000000001e308, math.inf, math.nan)] == [None] * 3
