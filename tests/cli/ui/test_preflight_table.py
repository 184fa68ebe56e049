"""The report as it is printed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from heretic.cli.ui.preflight_table import show
from heretic.hardware.devices import Device
from heretic.hardware.gpus import Gpu, GpuReport
from heretic.planning.memory_model import GIB, DeviceMemory
from heretic.planning.memory_plan import MemoryPlan
from heretic.planning.preflight import PreflightReport
from heretic.planning.preflight_facts import Finding


def printed(report: PreflightReport) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    show(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def load(name: str, weights: int) -> DeviceMemory:
    device = Device(name, 24 * GIB, 23 * GIB)
    return DeviceMemory(device, "embedding, blocks 0-13", weights * GIB, decoding=2 * GIB, headroom=2 * GIB)


def report(*findings: Finding, with_plan: bool = True) -> PreflightReport:
    gpus = GpuReport(tuple(Gpu(i, f"GPU-{i}", "NVIDIA GeForce RTX 4090", 24 * GIB, 23 * GIB) for i in range(2)))
    loads = (load("cuda:0", 14), load("cpu", 30))
    plan = MemoryPlan({"": 0}, None, "bfloat16", 8, 8, 100, 50, 2, loads, 0)
    return PreflightReport("owner/model", gpus, plan if with_plan else None, findings)


def test_devices_and_their_loads_fit_80_columns() -> None:
    text = printed(report())
    assert max(len(line) for line in text.splitlines()) <= 80
    lines = text.splitlines()
    first = next(line for line in lines if "cuda:0" in line)
    assert [cell.strip() for cell in first.split("│")][2:7] == ["23.0", "14.0", "2.0", "2.0", "18.0"]
    assert "nothing" in next(line for line in lines if "cuda:1" in line)
    assert "34.0" in next(line for line in lines if " cpu " in line)
    assert "bfloat16, batches of 8, 100 + 50 tokens" in text


def test_findings_are_sorted_and_show_their_remedy() -> None:
    text = printed(
        report(
            Finding("ok", "model", "fine"),
            Finding("warning", "batch size", "small", "batch_size = 4"),
            Finding("failure", "memory", "word " * 40, 'dtypes = ["bfloat16"]'),
        )
    )
    assert text.index("failure") < text.index("warning") < text.index("fine")
    assert "→ batch_size = 4" in text and '→ dtypes = ["bfloat16"]' in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(("level", "verdict"), [("ok", "Ready."), ("warning", "Risky"), ("failure", "would fail")])
def test_verdict_is_the_last_line(level: str, verdict: str) -> None:
    assert verdict in printed(report(Finding(level, "s", "t"))).splitlines()[-1]  # type: ignore[arg-type]


def test_text_from_outside_cannot_steer_the_terminal() -> None:
    text = printed(report(Finding("warning", "GPUs", "process \x1b[2J [red]x[/red]")))
    assert "\x1b" not in text and "[red]x[/red]" in text


def test_report_without_a_plan() -> None:
    assert "Devices (GiB)" in printed(report(with_plan=False))
