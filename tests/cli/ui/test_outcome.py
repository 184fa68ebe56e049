"""What is said at the end of a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from heretic.cli.ui.outcome import STILL_REFUSED, show_outcome
from heretic.pipeline.run import Outcome
from heretic.runs.folder import RunFolder
from tests.helpers.summaries import result, study_summary


@pytest.mark.parametrize(("left", "told"), [(40, True), (23, True), (22, False), (0, False)])
def test_a_model_that_still_refuses_most_requests_comes_with_advice(tmp_path: Path, left: int, told: bool) -> None:
    found = [result(0, 0.01, left)]
    outcome = Outcome(RunFolder(tmp_path, "stamp"), study_summary(found), found[0], "fewest refusals", None)
    shown = io.StringIO()
    show_outcome(Console(file=shown, width=200), outcome)  # the original refuses 44
    assert (STILL_REFUSED in shown.getvalue()) == told
