"""The whole preflight, with a tiny model on disk and GPUs that are not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from heretic.hardware import locks
from heretic.hardware.gpus import Gpu, GpuReport
from heretic.hardware.obstacles import Obstacle
from heretic.model.checkpoint import Checkpoint
from heretic.planning import preflight
from heretic.planning.preflight import PreflightReport, build_report
from heretic.planning.preflight_facts import Finding, PreflightInputs
from heretic.planning.workload import Workload, prompt_tokens
from heretic.settings import Settings
from tests.helpers.shapes import GIB, checkpoint_of, qwen_32b, small


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A computer without GPUs, in a folder of its own; the returned function gives it equal GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(preflight.host, "memory", lambda: (64 * GIB, 60 * GIB))
    monkeypatch.setattr(preflight.host, "free_disk", lambda _: 500 * GIB)

    def give(number: int, gib: float, usable: bool = True) -> None:
        why = None if usable else Obstacle("built for other devices", "another build", fails=False)
        gpus = tuple(Gpu(i, f"GPU-{i}", "RTX", int(gib * GIB), int(gib * GIB), obstacle=why) for i in range(number))
        report = GpuReport(gpus, None if gpus else "no NVIDIA driver")
        monkeypatch.setattr(preflight, "inspect_gpus", lambda _: (report, gpus if usable else ()))

    give(0, 0)
    return give


def run(checkpoint: Checkpoint | None = None, prompts: Any = None, **changes: Any) -> PreflightReport:
    settings = Settings(model="owner/model", **changes)
    inputs = PreflightInputs(Workload.of(settings, 300), checkpoint or checkpoint_of(small()), prompts)
    return build_report(settings, inputs)


def texts(report: PreflightReport) -> str:
    return "\n".join(f"{f.level} {f.subject}: {f.text} → {f.fix}" for f in report.findings)


def test_ready_on_a_cpu() -> None:
    report = run()
    assert (report.verdict, report.exit_status) == ("ready", 0), texts(report)
    assert report.plan is not None and report.plan.dtype == "float32" and report.plan.prompt_tokens == 141
    assert "no NVIDIA driver" in texts(report)
    assert json.loads(json.dumps(report.as_dict()))["verdict"] == "ready"


def test_a_model_that_cannot_be_opened_has_no_plan() -> None:
    settings = Settings(model="owner/model")
    missing = Finding("failure", "model", "No such model.", "check the name")
    report = build_report(settings, PreflightInputs(Workload.of(settings, 300), findings=(missing,)))
    assert (report.verdict, report.exit_status, report.plan) == ("fail", 1, None)
    assert missing in report.findings and json.dumps(report.as_dict())


def test_a_large_model_without_a_gpu_is_a_warning() -> None:
    report = run(checkpoint_of(qwen_32b()))
    assert "warning GPUs: " in texts(report) and "heretic doctor" in texts(report)


def test_wrong_device_is_a_failure() -> None:
    report = run(device_map="cuda:3")
    assert report.exit_status == 1 and "cuda:3" in texts(report) and "one of: cpu" in texts(report)


def test_the_painful_run_is_spread_over_four_gpus(machine: Callable[..., None]) -> None:
    machine(4, 24)
    large = checkpoint_of(qwen_32b())
    report = run(large)
    assert report.verdict == "ready" and report.plan is not None and len(report.plan.loads) == 4
    on_one = run(large, device_map="cuda:0")
    assert on_one.exit_status == 1 and 'device_map = "planned"' in texts(on_one)
    cached = run(large, apply="weights", batch_size=4, device_map="balanced", search={"start": "kernels"})
    assert cached.exit_status == 1 and "cache_weights = false" in texts(cached), (
        "there is no room to look at the weights"
    )
    unseen = {"search": {"start": "kernels"}, "ablation": {"geometry": "plain"}}
    cached = run(large, apply="weights", batch_size=4, device_map="balanced", **unseen)
    assert cached.exit_status == 2 and "cache_weights = false" in texts(cached)
    assert run(large, apply="weights", batch_size=4, cache_weights=False).verdict == "ready"
    machine(2, 24)
    assert run(large).exit_status == 1


def test_unusable_gpus_leave_the_cpu(machine: Callable[..., None]) -> None:
    machine(1, 24, usable=False)
    report = run()
    assert report.exit_status == 2 and report.gpus.gpus and report.plan is not None and not report.plan.on_gpu


def test_lock_of_this_process_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with locks.acquire_locks(locks.device_locks([]), model="owner/model"):
        assert run().verdict == "ready"
        monkeypatch.setattr(locks.LockOwner, "is_this_process", False)
        report = run()
    assert report.exit_status == 2 and "The CPU is in use by process" in texts(report)


def test_save_to(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").touch()
    assert "failure export: " in texts(run(save_to="full"))
    (tmp_path / "full/manifest.json").touch()
    assert run(save_to="full").verdict == "ready"
    assert run(save_to="new/deep").verdict == "ready"
    assert "failure export: " in texts(run(save_to="full/letter.txt"))
    assert "mount point" in texts(run(save_to="/proc"))


def test_prompt_warnings_are_passed_on() -> None:
    report = run(prompts=SimpleNamespace(warnings=["3 prompts are shared."]))
    assert report.exit_status == 2 and "3 prompts are shared." in texts(report)


def test_prompt_tokens_count_the_system_prompt() -> None:
    assert prompt_tokens(Settings(system_prompt="x" * 300, response_prefix=""), 30) == 150
