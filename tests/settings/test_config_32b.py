"""config.32b.toml says what the planner does, for both machines that it is written for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from heretic.hardware.virtual_gpus import virtual_gpus
from heretic.planning import preflight
from heretic.planning.preflight import PreflightReport, build_report
from heretic.planning.preflight_facts import PreflightInputs
from heretic.planning.workload import USUAL_PROMPT, Workload
from heretic.settings import Settings
from heretic.settings.sources import resolve
from tests.helpers.shapes import GIB, checkpoint_of, qwen_32b

CONFIG = Path(__file__).parents[2] / "config.32b.toml"
PLANNED = re.compile(r"^# Planned for (\S+): (spread over|all on) (\d), batches of (\d+) ", re.MULTILINE)
MACHINES = PLANNED.findall(CONFIG.read_text(encoding="utf-8"))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Those of the file, in a folder and on a disk with room."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(preflight.host, "memory", lambda: (64 * GIB, 60 * GIB))
    monkeypatch.setattr(preflight.host, "free_disk", lambda _: 500 * GIB)
    return resolve(CONFIG).settings


def planned(settings: Settings, devices: str) -> PreflightReport:
    large = checkpoint_of(qwen_32b())
    return build_report(
        settings,
        PreflightInputs(Workload.of(settings, USUAL_PROMPT), large),
        virtual=virtual_gpus(devices),
    )


def test_both_machines_are_in_the_file() -> None:
    assert [machine[0] for machine in MACHINES] == ["4x24GiB", "1x80GiB"]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine[0])
def test_it_says_what_the_planner_chooses(settings: Settings, machine: tuple[str, str, str, str]) -> None:
    devices, how, number, batch = machine
    report = planned(settings, devices)
    plan = report.plan
    assert report.verdict == "ready", [f for f in report.findings if f.level != "ok"]
    assert plan is not None and plan.fits and not plan.tight and plan.offloaded == plan.in_ram == 0
    assert settings.batch_size == 0 and plan.batch_size == plan.largest_batch_size == int(batch)
    assert len(plan.loads) == int(number) and (len(set(plan.device_map.values())) > 1) == (how == "spread over")
    assert settings.dtypes == [plan.dtype] == ["bfloat16"] and settings.device_map == "planned"


def test_its_named_lines_change_nothing_that_the_planner_would_choose_otherwise(settings: Settings) -> None:
    """The lines for the A100 that stand there as comments, taken."""
    one = planned(settings, "1x80GiB")
    named = planned(settings.model_copy(update={"device_map": "cuda:0"}), "1x80GiB")
    assert one.plan is not None and named.plan is not None
    assert named.plan.device_map == one.plan.device_map and named.plan.batch_size == one.plan.batch_size
