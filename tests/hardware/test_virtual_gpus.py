"""Plans for GPUs that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heretic.hardware.virtual_gpus import virtual_gpus
from heretic.planning.preflight import build_report
from heretic.planning.preflight_facts import PreflightInputs
from heretic.planning.workload import USUAL_PROMPT, Workload
from heretic.settings import Settings
from tests.helpers.errors import raises
from tests.helpers.shapes import GIB, checkpoint_of, qwen_32b


@pytest.mark.parametrize("text", ["4x24GiB", " 4 X 24 gib ", "2x24GiB,2x24GiB"])
def test_sizes_are_read_in_any_spelling(text: str) -> None:
    gpus = virtual_gpus(text)
    assert [g.index for g in gpus] == [0, 1, 2, 3] and len({g.uuid for g in gpus}) == 4
    assert all(g.total == 24 * GIB and 23 * GIB < g.free < 24 * GIB for g in gpus)


def test_kinds_and_decimal_units_are_distinguished() -> None:
    small, large = virtual_gpus("1x24GB, 1x80GiB")
    assert small.total == 24 * 10**9 and large.total == 80 * GIB


def test_another_kind_stands_before_the_list() -> None:
    assert [gpu.device.name for gpu in virtual_gpus("xpu:2x16GiB")] == ["xpu:0", "xpu:1"]
    assert [gpu.device.name for gpu in virtual_gpus("mps:1x64GiB")] == ["mps"]
    assert [gpu.kind for gpu in virtual_gpus("ROCm:1x24GiB")] == ["rocm"]


@pytest.mark.parametrize(
    "text",
    [
        "mps:2x64GiB",
        "tpu:1x8GiB",
        "xpu:",
        "",
        "24GiB",
        "4x",
        "0x24GiB",
        "4x0GiB",
        "x24GiB",
        "4x24",
        "-1x24GiB",
        "999x24GiB",
        "4x24GiB,",
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with raises("invalid-option") as caught:
        virtual_gpus(text)
    assert caught.value.where == "--devices" and "4x24GiB" in str(caught.value.fix)


def test_the_reported_machine_is_planned_without_having_it(tmp_path: Path) -> None:
    """The seed's user saw 17 + 17 + 17 + 15 GB on four GPUs of 24 GB."""
    settings = Settings(model="a/b", runs_dir=str(tmp_path))
    report = build_report(
        settings,
        PreflightInputs(Workload.of(settings, USUAL_PROMPT), checkpoint_of(qwen_32b())),
        virtual=virtual_gpus("4x24GiB"),
    )
    assert report.plan is not None and report.plan.fits and report.plan.on_gpu
    weights = [load.weights / GIB for load in report.plan.loads]
    assert len(weights) == 4 and max(weights) - min(weights) < 3 and sum(weights) == pytest.approx(61.0, abs=0.5)
    assert json.dumps(report.as_dict())
    assert not any("held by" in f.text for f in report.findings)
