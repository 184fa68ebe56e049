"""Memory inside control groups, and disks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from heretic.hardware import host
from heretic.hardware.gpus import Gpu

MIB = 2**20


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_without_groups(tmp_path: Path) -> None:
    total, available = host.memory(tmp_path)
    assert total == psutil.virtual_memory().total and 0 < available <= total


def test_memory_in_version_2(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/jobs/one\n")
    job = tmp_path / "sys/fs/cgroup/jobs"
    write(job / "one/memory.max", "max\n")
    write(job / "memory.max", str(64 * MIB))
    write(job / "memory.current", str(40 * MIB))
    write(job / "memory.stat", f"anon 1\ninactive_file {10 * MIB}\nactive_file {5 * MIB}\n")
    assert host.memory(tmp_path) == (64 * MIB, 39 * MIB)  # cached files can be dropped


def test_memory_in_version_1_container(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n")
    base = tmp_path / "sys/fs/cgroup/memory"  # the container sees its own group as the root
    write(base / "memory.limit_in_bytes", str(64 * MIB))
    write(base / "memory.usage_in_bytes", str(70 * MIB))
    write(base / "memory.stat", "total_inactive_file 0\n")
    assert host.memory(tmp_path) == (64 * MIB, 0)


def test_devices() -> None:
    found = host.devices([Gpu(0, "u", "n", 10, 5), Gpu(1, "v", "n", 20, 15)])
    assert [(d.name, d.total, d.free) for d in found[:2]] == [("cuda:0", 10, 5), ("cuda:1", 20, 15)]
    assert found[2].name == "cpu" and found[2].free > 0


def test_disk(tmp_path: Path) -> None:
    deep = tmp_path / "a/b/c"
    assert host.existing_parent(deep) == tmp_path
    assert host.free_disk(deep) > 0 and host.can_write(deep)
    (tmp_path / "file").touch()
    assert not host.can_write(tmp_path / "file/below")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert not host.can_write(tmp_path / "new")


def test_spell_bytes() -> None:
    assert (host.format_bytes(2**30), host.format_bytes(512 * MIB), host.format_bytes(0)) == (
        "1.0 GiB",
        "512 MiB",
        "0 MiB",
    )


@pytest.mark.parametrize("mode, most", [("0", 30 * 1024), ("1", None), ("2", 12 * 1024)])
def test_how_large_a_mapped_file_may_be(tmp_path: Path, mode: str, most: int | None) -> None:
    for name, text in {
        "sys/vm/overcommit_memory": f"{mode}\n",
        "meminfo": "MemTotal: 20 kB\nSwapTotal: 10 kB\nCommitLimit: 12 kB\n",
    }.items():
        (tmp_path / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / name).write_text(text)
    assert host.mappable(tmp_path) == most
    assert host.mappable(tmp_path / "elsewhere") is None


def test_the_limit_on_addresses_counts_for_a_run_on_the_cpu() -> None:
    code = (
        "import psutil, resource\n"
        "from heretic.hardware import host\n"
        "host.devices(())\n"
        "limit = psutil.Process().memory_info().vms + (300 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "print(host.devices(())[0].free)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 200 << 20 < int(ran.stdout) <= 300 << 20
