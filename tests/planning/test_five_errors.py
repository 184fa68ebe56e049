"""The five errors that the seed's user had on 4x 24 GiB: none can happen with default settings, and each has a rule."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heretic.errors import BusyError
from heretic.hardware.gpus import Gpu, GpuProcess, GpuReport
from heretic.hardware.locks import device_locks
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint
from heretic.pipeline import run as run_module
from heretic.planning import preflight
from heretic.planning.preflight import PreflightReport, build_report
from heretic.planning.preflight_facts import PreflightInputs
from heretic.planning.workload import USUAL_PROMPT, Workload
from heretic.progress import NULL_REPORTER
from heretic.settings import Settings
from tests.helpers.errors import raises
from tests.helpers.shapes import GIB, checkpoint_of, qwen_32b

HOLD = """
import sys
from pathlib import Path
from heretic.hardware.locks import acquire_locks
with acquire_locks([Path(p) for p in sys.argv[1:]], model="owner/first"):
    print("held", flush=True)
    sys.stdin.read()
"""


def cards(*processes: GpuProcess, used: float = 0.5) -> tuple[Gpu, ...]:
    """Four RTX 4090; the processes are on the first."""
    free = [int((24 - (used if i == 0 else 0.5)) * GIB) for i in range(4)]
    return tuple(Gpu(i, f"GPU-{i}", "RTX 4090", 24 * GIB, free[i], processes if i == 0 else ()) for i in range(4))


@pytest.fixture(scope="module")
def large() -> Checkpoint:
    return checkpoint_of(qwen_32b())


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(preflight.host, "memory", lambda: (64 * GIB, 60 * GIB))
    monkeypatch.setattr(preflight.host, "free_disk", lambda _: 500 * GIB)
    on(monkeypatch, cards())


def on(monkeypatch: pytest.MonkeyPatch, gpus: tuple[Gpu, ...]) -> None:
    monkeypatch.setattr(preflight, "inspect_gpus", lambda _: (GpuReport(gpus), gpus))
    monkeypatch.setattr(run_module, "gpus_here", lambda: gpus)


def planned(large: Checkpoint, **changes: Any) -> PreflightReport:
    settings = Settings(model="owner/model", **changes)
    return build_report(
        settings,
        PreflightInputs(Workload.of(settings, USUAL_PROMPT), large),
    )


def found(report: PreflightReport, subject: str) -> tuple[str, str | None]:
    """Level and remedy of the only finding on a subject."""
    (one,) = [f for f in report.findings if f.subject == subject]
    return one.level, one.fix


def test_with_defaults_none_of_them_is_found(large: Checkpoint) -> None:
    report = planned(large)
    assert report.verdict == "ready", [f for f in report.findings if f.level != "ok"]


def test_everything_on_gpu_0(large: Checkpoint) -> None:
    plan = planned(large).plan
    assert plan is not None and len(plan.loads) == 4 and all(load.fits for load in plan.loads)
    assert max(load.weights for load in plan.loads) < 1.2 * min(load.weights for load in plan.loads)
    assert found(planned(large, device_map="cuda:0"), "device_map") == ("failure", 'device_map = "planned"')


def test_cached_weights_on_a_sharded_model(large: Checkpoint) -> None:
    plan = planned(large).plan
    assert plan is not None and not any(load.copies for load in plan.loads), "a trial edits no weights"
    level, fix = found(planned(large, apply="weights", batch_size=4, device_map="balanced"), "cache_weights")
    assert level == "failure" and str(fix).startswith("cache_weights = false")


def test_iterative_rounds_out_of_memory(large: Checkpoint) -> None:
    plan, rounds = planned(large).plan, planned(large, directions={"iterative_rounds": 4}, batch_size=32).plan
    assert plan is not None and not any(load.rounds for load in plan.loads), "there are none by default"
    assert rounds is not None and rounds.fits, "and four would fit"
    assert all(0 < load.rounds < GIB // 8 for load in rounds.loads)
    many = planned(large, directions={"iterative_rounds": 4}, trials_per_batch=500, batch_size=64)
    level, fix = found(many, "iterative rounds")
    assert level == "warning" and str(fix).startswith("directions.iterative_rounds = 0")


def test_batch_size_too_small_or_too_large(large: Checkpoint) -> None:
    plan = planned(large).plan
    assert plan is not None and 8 <= plan.batch_size == plan.largest_batch_size and plan.fits and not plan.tight
    assert found(planned(large, batch_size=2048), "batch size") == ("warning", f"batch_size = {plan.batch_size}")
    assert found(planned(large, batch_size=1), "batch size") == ("warning", f"batch_size = {plan.batch_size}")


@pytest.fixture
def neighbor() -> Iterator[subprocess.Popen[str]]:
    """A run that holds the first GPU."""
    words = [sys.executable, "-c", HOLD, *map(str, device_locks(["GPU-0"]))]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == "held"
    yield process
    process.kill()
    process.communicate()


def test_two_processes_on_one_gpu(
    large: Checkpoint, neighbor: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        raises("busy", BusyError) as refused,
        run_module.device_lock(Settings(model="owner/model"), wait=False, reporter=NULL_REPORTER, stop=StopSignal()),
    ):
        pass
    assert str(neighbor.pid) in refused.value.what
    assert found(planned(large), "lock") == ("warning", "add --wait to wait until it is free")
    on(monkeypatch, cards(GpuProcess(77, "python", 5 * GIB), used=5.5))
    level, fix = found(planned(large), "GPUs")
    assert level == "warning" and "kill 77" in str(fix)
