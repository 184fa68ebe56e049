"""Stored scores, also those of earlier versions."""

from __future__ import annotations

from typing import Any

import pytest

from heretic.scoring.scores import Scores

OLD: dict[str, Any] = {
    "divergence": {"mean": 0.1, "median": 0.1, "p95": 0.1, "max": "inf"}, "refusals": 3, "total": 10,
    "seconds": {}, "refusal_proxy": None, "refused": "1110000000",
}  # fmt: skip
COUNTS = {"over_refusals": 2, "degenerate": 1, "total": 8}


def test_scores_of_earlier_versions_are_read() -> None:
    found = Scores.from_dict(OLD)
    assert (found.evasive, found.unanswered, found.judge, found.within_limits) == (0, 3, "markers", True)
    assert found.value("over_refusals") is None and Scores.from_dict({**OLD, "harmless_metrics": None}) == found


@pytest.mark.parametrize("more", [{}, {"values": {"unchanged": 0.5}}])
def test_counts_of_harmless_answers_become_numbers_of_scorers(more: dict[str, Any]) -> None:
    found = Scores.from_dict({**OLD, "harmless_metrics": COUNTS, **more})
    assert (found.value("over_refusals"), found.value("degenerate")) == (2, 1)
    assert found.value("over_refusals.total") == 8 and found.value("unchanged") == more.get("values", {}).get(
        "unchanged"
    )
    assert Scores.from_dict(found.as_dict()) == found


@pytest.mark.parametrize(
    "damaged",
    [
        {"harmless_metrics": {}},
        {"harmless_metrics": {**COUNTS, "total": "x"}},
        {"harmless_metrics": COUNTS, "values": 3},
    ],
)
def test_damaged_counts_are_refused(damaged: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Scores.from_dict({**OLD, **damaged})
