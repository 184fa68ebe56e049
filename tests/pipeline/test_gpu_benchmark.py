"""The benchmark for the day a GPU is there, on a pretend one, so that it cannot rot."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.helpers.pretend_gpus import PretendGpus

pytestmark = pytest.mark.usefixtures("cuda")
ROOT = Path(__file__).parents[2]
UNKNOWN_THERE = ("bnb_4bit", "compile")  # bitsandbytes and Triton have kernels of their own, which no pretend GPU has


def test_every_step_reports_on_a_pretend_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT), *sys.path])
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "PROMPTS", {"train": 8, "eval": 4})
    monkeypatch.setattr(gpu, "DECODING_ROWS", (1, 4))
    monkeypatch.setattr(gpu, "NEW_TOKENS", 16)
    out = tmp_path / "gpu.json"
    with PretendGpus(1):
        gpu.measure("tiny", tmp_path / "work", out, {}, 10_000, tests=False)
    report = json.loads(out.read_text())
    failed = {step: found for step, found in report.items() if isinstance(found, dict) and "error" in found}
    assert set(failed) <= set(UNKNOWN_THERE), failed
    assert report["study"]["trials"] == 2 and report["study"]["verified"] is not None
    assert max(report["study"]["peaks"].values()) > 0 and report["study"]["plan"]
    assert [row["rows"] for row in report["passes"]["decoding"]] == [1, 4]
