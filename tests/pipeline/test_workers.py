"""heretic run --workers: real processes on one study, in the run's own file."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import psutil
import pytest

from heretic.errors import BusyError, Interrupted
from heretic.hardware import locks
from heretic.hardware.gpus import Gpu
from heretic.hardware.virtual_gpus import virtual_gpus
from heretic.pipeline.workers import WorkerCount, _only, check_memory, choose_gpus, resolve_worker_count
from heretic.planning.memory_model import GIB
from heretic.settings import Settings
from heretic.storage.attributes import ERROR
from tests.helpers.command import start
from tests.helpers.endpoint import endpoint
from tests.helpers.errors import raises
from tests.helpers.shapes import checkpoint_of, qwen_32b, small
from tests.pipeline.test_kill import trials, wait_for

RUN = ("run", "--run-name", "mine", "--workers", "2", "--trials", "14", "--set", "max_response_length=60", "--set",
       'refusal_markers=["zzz"]')  # fmt: skip


def children(pid: int) -> list[psutil.Process]:
    """The workers of a process; it has another child for the chat template."""
    found = []
    for process in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if "heretic" in process.cmdline():
                found.append(process)
    return found


def stored() -> optuna.Study:
    return optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db")


def finishers() -> set[int]:
    """Processes that have finished trials."""
    return {t.user_attrs["heretic:worker"]["pid"] for t in stored().trials if t.state.name == "COMPLETE"}


def test_two_workers_share_a_study_and_one_that_dies_is_not_missed(config: Path) -> None:
    process = start(*RUN, "--save-to", "out")
    wait_for(lambda: trials() >= 3 and len(finishers()) == 2, process)
    other = start("run", "--run-name", "mine")  # at once: it takes seconds to come as far as the lock
    first, second = children(process.pid)
    assert not any("postgres" in word or "=" in word for p in (first, second) for word in p.cmdline())
    first.send_signal(signal.SIGKILL)
    assert other.wait(timeout=60) == BusyError.exit_status, "another run may not use what the workers use"
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert re.search("Worker [01] .*SIGKILL", output)
    study = stored()
    assert trials() == 14 and {t.state.name for t in study.trials} <= {"COMPLETE", "FAIL"}
    assert len(finishers()) == 2
    assert Path("out/manifest.json").exists(), "the one that was started exports"
    assert 'save_to = "out"' in Path("runs/mine/config.toml").read_text()


def test_a_judge_that_fails_stops_every_worker_and_the_study_goes_on(config: Path) -> None:
    with endpoint() as server:
        settings = ("judge.kind=llm", f"judge.llm.base_url={server.url}", "judge.llm.model=m", "judge.llm.retries=0")
        command = (*RUN[:-2], *(word for setting in settings for word in ("--set", setting)))
        process = start(*command)
        wait_for(lambda: trials() >= 4 and len(finishers()) == 2, process)
        server.failing = 503
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1, output
        words = " ".join(output.split())
        assert "Worker 0 ended with status 1" in words and "Worker 1 ended with status 1" in words, output
        assert words.count("[judge-failed]") == 2 and "All 2 workers ended" in words, output
        assert trials("RUNNING") == 0 and not any(ERROR in t.user_attrs for t in stored().trials)
        done = trials()
        server.failing = 0
        alone = [word for word in command if word not in ("--workers", "2")]
        output, _ = start(*alone).communicate(timeout=300)
    assert 4 <= done < 14 and trials() == 14, output


def test_what_ends_the_first_process_ends_its_workers(config: Path) -> None:
    process = start(*RUN)
    wait_for(lambda: trials() >= 1, process)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == Interrupted.exit_status, output
    assert len(workers) == 2 and not any(w.is_running() for w in workers)
    assert trials("RUNNING") == 0
    process = start(*RUN)
    wait_for(lambda: len(children(process.pid)) == 2, process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers):
        assert time.monotonic() < end, "orphans without locks"
        time.sleep(0.1)


@pytest.mark.parametrize("interrupts", [2, 3])
def test_workers_that_do_not_react_are_killed_and_named(config: Path, interrupts: int) -> None:
    process = start(*RUN)
    workers = []
    try:
        wait_for(lambda: trials() >= 1, process)
        workers = children(process.pid)
        for worker in workers:
            worker.suspend()
        for _ in range(interrupts):
            assert all(w.is_running() for w in workers), "the first one lets them finish"
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    assert process.returncode == Interrupted.exit_status, output
    words = " ".join(output.split())
    assert len(workers) == 2 and all(f"process {w.pid}" in words.partition("Killed")[2] for w in workers), output


def test_a_lent_lock_is_used_with_its_holder_and_by_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with locks.acquire_locks([path], model="m"):
        with locks.acquire_locks([path], model="m", parent_pid=os.getpid()):
            assert locks.lock_owner(path) is not None
        assert locks.lock_owner(path) is not None, "the borrower let go of what is not its own"
        with pytest.raises(BusyError), locks.acquire_locks([path], model="m", parent_pid=os.getpid() + 1):
            pass


def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    found = tuple(Gpu(i, f"GPU-{i}", "A GPU", 24 << 30, 24 << 30) for i in range(number))
    monkeypatch.setattr("heretic.pipeline.workers.gpus_here", lambda: found)


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_worker_count("auto", Settings())[0] == WorkerCount()
    assert resolve_worker_count("3", Settings())[0] == WorkerCount(3)
    assert "hardly faster" in resolve_worker_count("3", Settings())[1]
    gpus(monkeypatch, 4)
    assert resolve_worker_count("auto", Settings()) == (WorkerCount(4, fewer=True), "")
    assert resolve_worker_count("2", Settings()) == (WorkerCount(2), "")
    with raises("too-many-workers"):
        resolve_worker_count("5", Settings())
    with raises("conflicting-settings"):
        resolve_worker_count("2", Settings(device_map="cuda:1"))
    for wrong in ("0", "-1", "many"):
        with raises("invalid-option"):
            resolve_worker_count(wrong, Settings())


def test_a_worker_sees_one_gpu_by_the_variable_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(kind: str, uuid: str = "x") -> dict[str, str]:
        return _only(Gpu(1, uuid, "A GPU", 24 << 30, 24 << 30, kind=kind))

    assert only("xpu") == {"ZE_AFFINITY_MASK": "1"} and only("mps") == {}
    assert only("cuda", "GPU-1a") == {"CUDA_VISIBLE_DEVICES": "GPU-1a"}
    assert only("rocm", "GPU-1a") == {"HIP_VISIBLE_DEVICES": "1"}
    assert only("xpu", "GPU-1a") == {"ZE_AFFINITY_MASK": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert only("rocm") == {"CUDA_VISIBLE_DEVICES": "6"}
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,3")
    assert only("npu") == {"ASCEND_RT_VISIBLE_DEVICES": "3"}


def test_a_model_for_several_gpus_has_no_workers() -> None:
    large, cards = checkpoint_of(qwen_32b()), virtual_gpus("4x24GiB")
    inputs: Any = SimpleNamespace(
        checkpoint=large, prompts=SimpleNamespace(longest=600), plan=SimpleNamespace(dtypes=["bfloat16"])
    )
    with raises("too-many-workers"):
        check_memory(Settings(), inputs, cards, 4)
    with raises("too-many-workers"):  # which would move the rest to RAM
        check_memory(Settings(device_map="auto"), inputs, cards, 4)
    check_memory(Settings(quantization="bnb_4bit"), inputs, cards, 4)
    check_memory(Settings(), inputs, virtual_gpus("2x80GiB"), 2)
    full = replace(cards[0], free=GIB)
    with raises("too-many-workers"):
        check_memory(Settings(quantization="bnb_4bit"), inputs, (*cards, full), 5)
    with raises("conflicting-settings"):
        check_memory(Settings(max_memory={"0": "10GiB"}), inputs, virtual_gpus("2x80GiB"), 2)


def test_auto_leaves_out_gpus_that_are_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = virtual_gpus("3x24GiB")
    warnings: list[str] = []
    context: Any = SimpleNamespace(
        settings=Settings(quantization="bnb_4bit"),
        inputs=SimpleNamespace(
            checkpoint=checkpoint_of(qwen_32b()),
            prompts=SimpleNamespace(longest=600),
            plan=SimpleNamespace(dtypes=["bfloat16"]),
        ),
        reporter=SimpleNamespace(warning=warnings.append),
    )

    def chosen(gpus: tuple[Gpu, ...], count: WorkerCount) -> tuple[Gpu, ...]:
        monkeypatch.setattr("heretic.pipeline.workers.gpus_here", lambda: gpus)
        return choose_gpus(context, count)

    full = replace(cards[0], free=GIB)
    assert chosen(cards, WorkerCount(3, fewer=True)) == cards and not warnings
    assert chosen((full, *cards[1:]), WorkerCount(3, fewer=True)) == cards[1:] and len(warnings) == 1
    with raises("too-many-workers"):  # a number that the user has chosen
        chosen((full, *cards[1:]), WorkerCount(3))
    context.settings = Settings()
    assert chosen(cards, WorkerCount(3, fewer=True)) == () and len(warnings) == 2, "one process uses all of them"


def test_workers_without_gpus_share_the_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: Any = SimpleNamespace(
        checkpoint=checkpoint_of(small()),
        prompts=SimpleNamespace(longest=600),
        plan=SimpleNamespace(dtypes=["float32"]),
    )
    monkeypatch.setattr("heretic.hardware.host.memory", lambda: (8 * GIB, 8 * GIB))
    check_memory(Settings(), inputs, (), 2)
    with raises("too-many-workers"):
        check_memory(Settings(), inputs, (), 8)
