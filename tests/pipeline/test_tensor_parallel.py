"""Tensor parallelism: two processes over gloo come to what one comes to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from heretic.interrupt import StopSignal
from heretic.model.checkpoint import open_checkpoint
from heretic.pipeline.run import run
from heretic.pipeline.tensor_parallel import broadcast_from_rank0, check, rank, size
from heretic.progress import NULL_REPORTER
from heretic.search.pareto import Result, results
from heretic.settings import Settings
from heretic.settings.sources import resolve
from tests.helpers.errors import raises


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "127.0.0.1:0", "-m", "heretic", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def found(name: str) -> list[Result]:
    return results(optuna.load_study(study_name="heretic", storage=f"sqlite:///runs/{name}/study.db"))


def test_two_processes_come_to_what_one_comes_to(config: Path) -> None:
    run(resolve(config, {"run_name": "alone"}), reporter=NULL_REPORTER, stop=StopSignal())
    both = torchrun("run", "--run-name", "both", "--save-to", "out", "--trials", "4")
    assert both.returncode == 0, both.stdout + both.stderr
    assert both.stdout.count("Trial 3 (4 of 4)") == 1, "both processes spoke"
    assert Path("out/manifest.json").exists(), "the leader exports what all measured"
    for ours, theirs in zip(found("both"), found("alone"), strict=True):
        assert ours.params == theirs.params
        assert ours.scores.refusals == theirs.scores.refusals
        assert ours.scores.divergence.mean == pytest.approx(theirs.scores.divergence.mean, rel=1e-3, abs=1e-6)


def test_what_cannot_be_shared_is_said_before_anything_is_loaded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(llama))
    assert rank() == 0 and size() == 1 and broadcast_from_rank0(lambda: 5) == 5
    check(checkpoint, Settings())
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with raises("tensor-parallel-unsupported") as refused:
        check(checkpoint, Settings())
    assert "4 attention heads" in refused.value.what and "2 key-value heads" in refused.value.what
    assert refused.value.fix == "--nproc-per-node 2"
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(checkpoint, Settings())
    with raises("tensor-parallel-unsupported"):
        check(checkpoint, Settings(apply="weights"))
    with raises("tensor-parallel-unsupported"):
        check(checkpoint, Settings.model_validate({"ablation": {"geometry": "conditional"}}))
