"""What the CPU computes natively."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from heretic.hardware import cpu
from heretic.hardware.cpu import cpuinfo_features, native_bfloat16, usable_cores


@pytest.mark.parametrize(
    ("name", "native"), [("avx512_bf16", True), ("amx_bf16", True), ("bf16", True), ("avx512_f", False)]
)
def test_bfloat16_is_native_where_an_instruction_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, name: str, native: bool
) -> None:
    monkeypatch.setattr(cpu, "_features", lambda: {name, "avx2"})
    assert native_bfloat16.__wrapped__() == native
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not native_bfloat16.__wrapped__(), "PyTorch without oneDNN does not use it"


def test_features_come_from_pytorch_and_without_its_function_from_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"avx512_bf16": True, "amx_bf16": False, "l1d_cache_size": 32768, "architecture": "x86_64"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed, raising=False)
    assert cpu._features() == {"avx512_bf16"}
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(cpu, "cpuinfo_features", lambda: {"fma"})
    assert cpu._features() == {"fma"}


def test_features_of_linux(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nvmx flags\t: vnmi\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpuinfo_features(file) == {"fpu", "avx512_bf16"}
    file.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert cpuinfo_features(file) == {"fp", "asimd", "bf16"}
    assert cpuinfo_features(tmp_path / "none") == set()


def test_a_quota_of_the_container_limits_the_cores(tmp_path: Path) -> None:
    cores = usable_cores(tmp_path)
    assert cores == len(os.sched_getaffinity(0))
    group = tmp_path / "sys/fs/cgroup"
    (group / "jobs/one").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs/one\n")
    (group / "jobs/one/cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == cores
    (group / "jobs/cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "proc/self/cgroup").write_text(
        "4:cpu,cpuacct:/docker/abc\n"
    )  # version 1: a container sees its own group
    (group / "cpu").mkdir()
    for name, number in (("quota", -1), ("period", 100000)):
        (group / f"cpu/cpu.cfs_{name}_us").write_text(f"{number}\n")
    assert usable_cores(tmp_path) == cores
    (group / "cpu/cpu.cfs_quota_us").write_text("90000\n")
    assert usable_cores(tmp_path) == 1
