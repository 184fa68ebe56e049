"""One ablation without a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heretic.pipeline.ablate import gentlest
from heretic.runs.status import read_status
from heretic.search.gradient_path import PathPoint
from tests.helpers.command import heretic

SEARCH = (
    "--set", 'search.start="gradient"', "--set", "search.gradient.weights=[0.5]", "--set", "search.gradient.steps=2",
    "--set", "search.gradient.mine_refusals=false", "--set", "search.gradient.second_search=false",
    "--set", 'refusal_markers=["e"]',
)  # fmt: skip


def point(weight: float, probability: float) -> PathPoint:
    return PathPoint(weight, {"mlp": (1.0,)}, 0.0, probability)


def test_the_gentlest_point_that_hardly_refuses_is_taken() -> None:
    gentle, middle, strict = point(1, 0.5), point(2, 0.04), point(3, 0.001)
    assert gentlest((gentle, middle, strict)) is middle
    assert gentlest((gentle, point(2, 0.3))).weight == 2


def test_a_given_strength_is_written_and_verified(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = heretic(capsys, monkeypatch, "ablate", "-o", "out", "--strength", "1", "--layer", "2", "--json")
    assert ran.status == 0, ran.err
    ablation = json.loads(Path("out/manifest.json").read_text())["ablation"]
    assert {s for profile in ablation["strengths"].values() for s in profile} == {1.0}
    assert ablation["mixture"] == [0.0, 0.0, 1.0, 0.0]
    assert json.loads(ran.out)["original_refusals"] >= 0


def test_the_gradient_search_gives_an_ablation_and_no_trial(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = heretic(capsys, monkeypatch, "ablate", "-o", "out", *SEARCH, "--set", "run_name=mine")
    assert ran.status == 0, ran.err
    assert Path("out/manifest.json").is_file() and "heretic run" in ran.out
    assert read_status("mine", "runs", {}).summary.n_complete == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--layer", "2"], "conflicting-options"),
        (["--strength", "nan"], "invalid-option"),
        (["--strength", "-1"], "invalid-option"),
        (["--strength", "1", "--layer", "9"], "invalid-option"),
        ([], "no-gradient-path"),  # the settings start with kernels
    ],
)
def test_what_cannot_be_done_is_an_error(
    arguments: list[str], code: str, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = heretic(capsys, monkeypatch, "ablate", "-o", "out", *arguments)
    assert (ran.status, ran.code) == (1, code) and not Path("out").exists()
