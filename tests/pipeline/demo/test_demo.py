"""The demo from end to end on the real model, with a gradient search of two steps and one trial more instead of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.interrupt import StopSignal
from heretic.pipeline.demo.demo import DemoOutcome, run_demo
from heretic.progress import NULL_REPORTER

REQUESTS = 12


@pytest.mark.slow
@pytest.mark.timeout(900)  # a whole demo, beside another test on the other core
def test_the_guard_refuses_and_an_ablation_removes_it(tmp_path: Path) -> None:
    def made() -> DemoOutcome:
        return run_demo(
            tmp_path / "demo",
            trials=2,
            assignments=[
                *(f"prompts.{kind}_train.split=train[:16]" for kind in ("harmful", "harmless")),
                *(f"prompts.{kind}_eval.split=train[:{REQUESTS}]" for kind in ("harmful", "harmless")),
                "search.gradient.prompts=12",
                "search.gradient.batch=6",
                "search.gradient.steps=2",
                "search.gradient.weights=[1.5]",
                "search.gradient.learning_rate=0.5",
                "search.gradient.second_search=false",
                "search.gradient.mine_refusals=false",  # so short a search would go on to stricter weights
            ],
            reporter=NULL_REPORTER,
            stop=StopSignal(),
            on_report=lambda report: None,
        )

    demo = made()
    outcome = demo.outcome
    assert outcome.original_refusals is not None and outcome.original_refusals >= 0.8 * REQUESTS
    assert len(outcome.results) == 2 and outcome.export is not None
    proof = outcome.export.verification
    assert proof.scores.refusals < outcome.original_refusals
    assert proof.divergence < 1e-3
    assert demo.ablated_from_base is not None and demo.ablated_from_base < demo.guarded_from_base
    again = made()
    assert again.outcome.export is not None
    assert again.outcome.export.verification.scores.refusals == proof.scores.refusals
