"""What is said about the original's measurements."""

from __future__ import annotations

import pytest
import torch

from heretic.model.response_prefix import AnswerStart
from heretic.runs.stored_tensors import Baseline
from heretic.scoring.judges.verdict import ANSWER, REFUSAL
from heretic.session.baseline_report import report_baseline
from tests.helpers.reporters import RecordingReporter


@pytest.mark.parametrize(
    ("probability", "refusals", "warnings"), [(0.6, 5, 0), (0.6, 0, 1), (0.999, 5, 1), (0.999, 0, 2)]
)
def test_a_baseline_that_shows_nothing_is_warned_of(probability: float, refusals: int, warnings: int) -> None:
    log_probs = torch.tensor([[probability, (1 - probability) / 2, (1 - probability) / 2]] * 3).log()
    verdicts = (*[REFUSAL] * refusals, *[ANSWER] * (10 - refusals))
    reporter = RecordingReporter()
    report_baseline(Baseline(log_probs, verdicts, ((),) * 10, AnswerStart(), ((),) * 3), reporter)  # type: ignore[arg-type]
    assert len(reporter.warnings) == warnings and len(reporter.infos) == 1
