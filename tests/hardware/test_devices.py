"""Accelerators that are not here, played by `tests.helpers.fake_accelerator`, and which files may name one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import heretic
from heretic.hardware import devices, memory_usage
from heretic.hardware.devices import KINDS, OUT_OF_MEMORY, Device
from heretic.hardware.gpus import Gpu, GpuReport, inspect_gpus, usable_gpus
from heretic.model.batching import free_memory, out_of_memory
from heretic.runs.environment import collect, computed_on
from tests.helpers.fake_accelerator import GIB, hide, play


@pytest.fixture(autouse=True)
def much_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB))


@pytest.mark.parametrize(
    ("prefix", "hip", "kind", "names"),
    [
        ("cuda", None, "cuda", ["cuda:0", "cuda:1"]),
        ("cuda", "6.4", "rocm", ["cuda:0", "cuda:1"]),
        ("xpu", None, "xpu", ["xpu:0", "xpu:1"]),
        ("npu", None, "npu", ["npu:0", "npu:1"]),
        ("mps", None, "mps", ["mps"]),
    ],
)
def test_every_kind_gives_devices_with_pytorchs_names(
    monkeypatch: pytest.MonkeyPatch, prefix: str, hip: str | None, kind: str, names: list[str]
) -> None:
    play(monkeypatch, prefix, *[None] * len(names), hip=hip)
    found = usable_gpus(GpuReport(()))
    assert devices.current_kind() == kind
    assert [gpu.device for gpu in found] == [Device(name, 8 * GIB, 5 * GIB) for name in names]
    assert len({gpu.uuid for gpu in found}) == len(names)  # each has a lock of its own


def test_an_accelerator_that_heretic_does_not_know_is_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "hpu", None)
    report, usable = inspect_gpus({})
    assert usable == () and "hpu" in str(report.problem) and not devices.pins_memory()


def test_a_build_without_its_device_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, built_for="xpu")
    assert KINDS["xpu"].title in str(inspect_gpus({})[0].problem)
    for built_for in ("cuda", None):  # NVML explains CUDA's
        hide(monkeypatch, built_for=built_for)
        assert devices.unavailable() is None


def test_what_cannot_be_seen_is_said_only_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "xpu", None)
    report, usable = inspect_gpus({})
    assert len(usable) == 1 and report.problem is not None and KINDS["xpu"].title in report.problem
    assert report.problem in collect(None, "")["gpus"]


@pytest.mark.parametrize(
    ("name", "key", "called", "not_called"),
    [
        ("cuda:0", 0, [0, "0", "cuda", "CUDA:0", " cuda "], ["cuda:1", 1, "cpu", "", "-1", "mps"]),
        ("xpu:1", 1, [1, "1", "xpu:1"], ["xpu", "cuda:1", 0]),
        ("mps", "mps", ["mps", "mps:0", 0, "0"], ["mps:1", 1, "cuda"]),
        ("cpu", "cpu", ["cpu", "CPU"], ["0", 0, "cuda"]),
    ],
)
def test_a_device_answers_to_its_name_and_number(
    name: str, key: int | str, called: list[int | str], not_called: list[int | str]
) -> None:
    device = Device(name, GIB, GIB)
    assert device.key == key and device.uses_ram == (name == "mps")
    assert all(map(device.is_called, called)) and not any(map(device.is_called, not_called))


def test_free_memory_of_a_mac_is_the_least_of_metals_and_the_rams(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "mps", None, free=20, total=24)
    assert usable_gpus(GpuReport(()))[0].free == 20 * GIB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB, available=3 * GIB))
    assert usable_gpus(GpuReport(()))[0].free == 3 * GIB == devices.free_bytes(torch.device("mps"))


def test_a_driver_that_does_not_tell_free_memory_leaves_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_: int) -> tuple[int, int]:
        raise RuntimeError("The device doesn't support querying the available free memory")

    play(monkeypatch, "xpu", None, mem_get_info=silent)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", silent)
    assert usable_gpus(GpuReport(()))[0].free == 8 * GIB
    play(monkeypatch, "npu", None, mem_get_info=lambda index: (GIB, 2 * GIB))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", silent)
    assert usable_gpus(GpuReport(()))[0].free == GIB


def test_own_and_peak_memory_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "xpu", None)
    gpu, _ = memory_usage.memory_usage()
    assert (gpu.used, gpu.own, gpu.peak) == (3 * GIB, 3 * GIB, 8 * GIB)
    assert [usage.device for usage in memory_usage.memory_usage(pid=1)] == ["RAM"]  # another process's is unknown

    def unsupported(_: int) -> int:
        raise RuntimeError("not supported on MPS")

    play(monkeypatch, "mps", None)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", unsupported)
    assert devices.own_memory(0) == (3 * GIB, 0)


def test_float64_is_computed_on_the_cpu_where_the_accelerator_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix, there in (("cuda", "cuda"), ("xpu", "cpu"), ("mps", "cpu")):
        play(monkeypatch, prefix, None)
        assert str(devices.for_float64(torch.device(prefix))) == there
    assert str(devices.for_float64(torch.device("cpu"))) == "cpu"


def test_cache_pins_and_hardware_name_follow_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    for prefix in ("cuda", "xpu", "mps", "npu"):
        play(monkeypatch, prefix, None, empty_cache=lambda prefix=prefix: emptied.append(prefix))
        host: list[str] = []
        monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda host=host: host.append("RAM"), raising=False)
        free_memory()
        assert bool(host) == KINDS[prefix].pinned
        assert devices.pins_memory() == KINDS[prefix].pinned
    assert emptied == ["cuda", "xpu", "mps", "npu"]
    assert computed_on(torch.device("mps")) == "Apple M3" and computed_on(torch.device("xpu")) == "from torch"
    hide(monkeypatch)
    free_memory()
    assert not devices.pins_memory()


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 15.72 GiB, max allowed: 18.13 GiB). Tried to allocate 5.81 GiB",
        "Invalid buffer size: 19.38 GiB",
        "NPU out of memory. Tried to allocate 22.00 MiB (NPU 0; 60.97 GiB total capacity)",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "HIP error: HIPBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_every_kinds_words_for_full_memory_are_known(text: str) -> None:
    assert out_of_memory(RuntimeError(text))
    assert not OUT_OF_MEMORY.search("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)")


def test_gpus_of_nvml_are_cudas() -> None:
    assert Gpu(1, "GPU-1", "RTX", 2, 1).device == Device("cuda:1", 2, 1)


# Files that may name accelerators, and why.
NAMING = {
    "hardware/devices.py": "the table",
    "hardware/gpus.py": "NVML and CUDA_VISIBLE_DEVICES, which NVML does not apply",
    "settings/__init__.py": "examples in the text of device_map",
    "settings/scoring.py": "an example in the text of judge.classifier.device",
}
NAMES = {"cuda", "xpu", "mps", "npu", "hpu"}
IN_TEXT = re.compile(
    r"\b(cuda|xpu|mps|npu|hpu|rocm|hip|nccl|xccl|hccl)\b|\w+_VISIBLE_DEVICES|ZE_AFFINITY_MASK", re.IGNORECASE
)


def named_in(source: str) -> list[str]:
    """Return what a module names in code: attributes and texts, without docstrings and comments."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in NAMES:
            found.append(f"line {node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found += [f"line {node.lineno}: {match[0]}" for match in IN_TEXT.finditer(node.value)]
    return found


def test_no_other_file_names_an_accelerator() -> None:
    root = Path(heretic.__file__).parent
    naming = {}
    for path in root.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if IN_TEXT.search(source) and (found := named_in(source)):
            naming[path.relative_to(root).as_posix()] = found
    assert set(naming) == set(NAMING), {name: found for name, found in naming.items() if name not in NAMING}
    assert sorted(named_in('x = torch.cuda.empty_cache()\n"""cuda"""\nf(f"cuda:{i}")')) == [
        "line 1: .cuda",
        "line 2: cuda",
        "line 3: cuda",
    ]
