"""What ablations do to harmless answers, measured for several trials at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from heretic.ablation.apply import apply_operators
from heretic.scoring.harmless_metrics import HarmlessProbe, degenerate
from heretic.scoring.judges.evasion import repetition
from heretic.scoring.objectives import Limits
from heretic.scoring.scores import PrunedTrial, Scores
from tests.scoring.test_refusal_count import ABLATIONS, model_context, together


def test_loops_and_empty_answers_are_degenerate() -> None:
    assert degenerate([]) and degenerate([7] * 9) and degenerate([1, 2] * 8)
    assert not degenerate([5]) and not degenerate(list(range(20))) and not degenerate([1, 2, 3, 4, 5] * 2)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_trials_together_come_to_what_each_comes_to_alone_and_beaten_ones_are_spared(llama: Path) -> None:
    evaluator, operator_factory, baseline = model_context(llama, share=True)
    bystanders = HarmlessProbe(evaluator.harmless, [""] * len(evaluator.harmless), in_trials=True)
    limits = Limits({"over_refusals": (4, "lower"), "degenerate": (2, "lower")})
    evaluator = replace(evaluator, harmless_probe=bystanders, limits=limits)
    expected = []
    for ablation in ABLATIONS:
        with apply_operators(operator_factory.writers, operator_factory.operators(ablation)):
            expected.append(evaluator.score(baseline))
    assert len({e.harmless_metrics for e in expected}) > 1
    found = together(evaluator, operator_factory, baseline, ABLATIONS)
    for one, reference in zip(found, expected, strict=True):
        assert (
            isinstance(one, Scores)
            and one.harmless_metrics == reference.harmless_metrics
            and one.excess == reference.excess
        )
        assert one.within_limits is (
            reference.harmless_metrics.over_refusals <= 4 and reference.harmless_metrics.degenerate <= 2
        )  # type: ignore[union-attr]
        assert Scores.from_dict(one.as_dict()) == one
    worst = max(e.refusals for e in expected)
    for one in together(evaluator, operator_factory, baseline, ABLATIONS, is_dominated=lambda _, n: n >= worst):
        assert isinstance(one, PrunedTrial) or one.harmless_metrics in {e.harmless_metrics for e in expected}  # type: ignore[attr-defined]


def test_scores_of_before_these_were_there_are_read() -> None:
    old = {
        "divergence": {"mean": 0.1, "median": 0.1, "p95": 0.1, "max": "inf"}, "refusals": 3, "total": 10,
        "seconds": {}, "refusal_proxy": None, "refused": "1110000000",
    }  # fmt: skip
    found = Scores.from_dict(old)
    assert (found.evasive, found.unanswered, found.judge, found.harmless_metrics, found.within_limits) == (
        0,
        3,
        "markers",
        None,
        True,
    )
