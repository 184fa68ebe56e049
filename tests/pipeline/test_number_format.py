"""The number format of a run that exists already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heretic.errors import StudyMismatch
from heretic.interrupt import StopSignal
from heretic.pipeline.prepare import RunInputs, prepare_run
from heretic.pipeline.run import open_locked_study, run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.helpers.reporters import RecordingReporter
from tests.tiny import save_tiny

NATIVE = "heretic.hardware.host.native_bfloat16"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16."""
    return save_tiny(tmp_path_factory.mktemp("models") / "half", dtype=torch.bfloat16)


def prepared(config: Path, half: Path, *assignments: str, fresh: bool = False) -> tuple[RunInputs, list[str]]:
    reporter = RecordingReporter()
    settings = resolve(config, {"model": str(half)}, assignments).settings
    return prepare_run(settings, force=False, fresh=fresh, reporter=reporter), reporter.warnings


def begin(inputs: RunInputs) -> None:
    inputs.folder.create()
    with open_locked_study(inputs, wait=False, reporter=NULL_REPORTER, stop=StopSignal()):
        pass


@pytest.mark.parametrize(
    ("native", "named"), [(True, ()), (False, ("run_name=mine",)), (True, ("storage=sqlite:///shared.db",))]
)
def test_a_run_keeps_its_number_format_on_another_cpu(
    config: Path, half: Path, monkeypatch: pytest.MonkeyPatch, native: bool, named: tuple[str, ...]
) -> None:
    monkeypatch.setattr(NATIVE, lambda: native)
    first, warnings = prepared(config, half, *named)
    assert first.plan.dtypes[0] == ("bfloat16" if native else "float32") and not warnings
    begin(first)
    assert prepared(config, half, *named) == (first, [])
    monkeypatch.setattr(NATIVE, lambda: not native)
    kept, warnings = prepared(config, half, *named)
    assert (kept.folder, kept.facts, kept.plan.dtypes) == (first.folder, first.facts, first.plan.dtypes)
    assert len(warnings) == 1
    begin(kept)
    fresh, warnings = prepared(config, half, *named, fresh=True)
    assert fresh.plan.dtypes[0] == ("float32" if native else "bfloat16") and not warnings


def test_a_named_format_and_other_settings_are_not_replaced(
    config: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(prepared(config, half, "run_name=mine")[0])
    monkeypatch.setattr(NATIVE, lambda: True)
    for changed in ('dtypes=["bfloat16"]', "max_response_length=7"):
        inputs, warnings = prepared(config, half, "run_name=mine", changed)
        assert inputs.plan.dtypes[0] == "bfloat16" and not warnings
        with raises("study-mismatch", StudyMismatch):
            begin(inputs)


def test_a_run_in_bfloat16_on_a_cpu_is_searched_exported_and_verified(
    config: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NATIVE, lambda: True)
    gradient = ("search.start=gradient", "search.gradient.weights=[0.5]", "search.gradient.steps=3",
                "search.gradient.second_search=false",
                "search.gradient.refusal_tokens=1", 'refusal_markers=["e"]')  # fmt: skip
    reporter = RecordingReporter()
    resolved = resolve(config, {"model": str(half), "save_to": "out", "n_trials": 1}, gradient)
    outcome = run(resolved, reporter=reporter, stop=StopSignal())
    assert outcome.export is not None and outcome.export.verification.tensors_checked > 0
    assert outcome.results[0].params.keys() >= {"path.point"}, "the gradient search failed"
    assert not [line for line in reporter.warnings if "kernels" in line]
