"""NVML played by a module of our own."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from heretic.hardware import devices
from heretic.hardware.gpus import (
    Gpu,
    GpuReport,
    driver_version,
    gpus_for,
    gpus_here,
    inspect_gpus,
    usable_gpus,
    visible_gpus,
)
from heretic.hardware.memory_usage import memory_usage
from heretic.runs.environment import collect
from tests.helpers.fake_accelerator import hide, play

GIB = 2**30
OWN = os.getpid()
PARENT = os.getppid()


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class FakeNvml(ModuleType):
    """Four GPUs; what a test sets aside from that is given by keyword."""

    NVMLError = NVMLError

    def __init__(self, names: tuple[str, ...] = ("RTX 4090",) * 4, **broken: Any) -> None:
        super().__init__("pynvml")
        self.names = names
        self.broken = broken
        self.open = 0

    def nvmlInit(self) -> None:
        if "init" in self.broken:
            raise self.broken["init"]
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}aaa-{handle}".encode()  # older versions answer in bytes

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        if "memory" in self.broken:
            raise self.broken["memory"]
        return SimpleNamespace(total=24 * GIB, free=(20 + handle) * GIB)

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        if handle in self.broken.get("mig", ()):
            return [1, 1]
        raise NVMLError("Not Supported")

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        if handle:
            raise NVMLError("Not Supported")
        return [
            SimpleNamespace(pid=OWN, usedGpuMemory=GIB),
            SimpleNamespace(pid=PARENT, usedGpuMemory=2 * GIB),
            SimpleNamespace(pid=2**22 + 5, usedGpuMemory=3 * GIB),
            SimpleNamespace(pid=2**22 + 6, usedGpuMemory=None),
        ]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=PARENT, usedGpuMemory=2 * GIB)]

    def nvmlSystemGetProcessName(self, pid: int) -> bytes:
        if pid == 2**22 + 5:
            return b"/usr/bin/on-the-host"
        raise NVMLError("Not Found")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return install(monkeypatch, FakeNvml())


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml) -> FakeNvml:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_everything_is_reported(nvml: FakeNvml) -> None:
    report = visible_gpus({})
    assert report.problem is None and nvml.open == 0
    assert [(gpu.index, gpu.uuid, gpu.free) for gpu in report.gpus][1] == (1, "GPU-1aaa-1", 21 * GIB)
    first, second = report.gpus[:2]
    assert [(p.name, p.used) for p in first.processes] == [
        ("on-the-host", 3 * GIB),
        (psutil.Process(PARENT).name(), 2 * GIB),
        ("unknown", None),
    ]
    assert [p.pid for p in second.processes] == [PARENT]


@pytest.mark.parametrize(
    ("wanted", "expected", "note"),
    [
        ("2,0", ["GPU-2aaa-2", "GPU-0aaa-0"], None),
        ("GPU-3", ["GPU-3aaa-3"], None),
        ("gpu-1aaa-1, 0", ["GPU-1aaa-1", "GPU-0aaa-0"], None),
        ("1,9,0", ["GPU-1aaa-1"], "'9'"),
        ("0,-1,1", ["GPU-0aaa-0"], "'-1'"),
        ("1,1", ["GPU-1aaa-1"], "'1'"),
        ("GPU-", [], "'GPU-'"),
        ("0,MIG-abc", ["GPU-0aaa-0"], "MIG slice MIG-abc"),
        ("", [], "no GPU is visible"),
        ("-1", [], "no GPU is visible"),
    ],
)
def test_cuda_visible_devices(nvml: FakeNvml, wanted: str, expected: list[str], note: str | None) -> None:
    report = visible_gpus({"CUDA_VISIBLE_DEVICES": wanted})
    assert [gpu.uuid for gpu in report.gpus] == expected
    assert [gpu.index for gpu in report.gpus] == list(range(len(expected)))
    assert (note is None and report.problem is None) or (note is not None and note in str(report.problem))


def test_divided_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(("A100",) * 2, mig=(0,)))
    report = visible_gpus({})
    assert [gpu.uuid for gpu in report.gpus] == ["GPU-1aaa-1"] and "MIG" in str(report.problem)


def test_order_of_different_gpus_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(("RTX 3090", "RTX 4090")))
    assert "PCI_BUS_ID" in str(visible_gpus({}).problem)
    assert visible_gpus({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).problem is None
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"}).problem is None


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (FakeNvml(init=NVMLError_LibraryNotFound()), "no NVIDIA driver"),
        (FakeNvml(init=NVMLError("Driver/library version mismatch")), "version mismatch"),
        (FakeNvml(memory=OSError()), "OSError"),
        (FakeNvml(()), "reports no GPU"),
        (None, "not installed"),
    ],
)
def test_never_raises(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml | None, reason: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    report = visible_gpus({})
    assert report.gpus == () and reason in str(report.problem)


def test_usable_gpus_are_numbered_as_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    report = GpuReport(tuple(Gpu(i, f"GPU-{i}A", "nvml", 24 * GIB, 20 * GIB) for i in range(3)))
    play(monkeypatch, "cuda", "2a", "0a")
    assert [(gpu.index, gpu.uuid, gpu.name) for gpu in usable_gpus(report)] == [
        (0, "GPU-2A", "nvml"),
        (1, "GPU-0A", "nvml"),
    ]


def test_a_gpu_without_kernels_in_this_build_is_left_out_and_the_numbers_stay(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml
) -> None:
    capabilities = [(6, 1), (8, 6)]
    built = {"get_device_capability": capabilities.__getitem__, "get_arch_list": lambda: ["sm_75", "sm_86"]}
    play(monkeypatch, "cuda", "1aaa-1", "0aaa-0", **built)
    report, usable = inspect_gpus({})
    assert [(gpu.index, gpu.uuid) for gpu in usable] == [(1, "GPU-0aaa-0")] and len(gpus_here()) == 1
    assert [gpu.uuid[:5] for gpu in report.gpus] == ["GPU-1", "GPU-0", "GPU-2", "GPU-3"]
    assert [gpu.obstacle is None for gpu in report.gpus] == [False, True, True, True]
    assert "6.1" in collect(None, "")["gpus"][1]
    play(monkeypatch, "cuda", "1aaa-1", hip="6.4", **built)  # its builds name other things
    assert len(gpus_here()) == 1


def test_bfloat16_is_emulated_below_capability_8(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "cuda", "a", "b", get_device_capability=[(7, 5), (8, 0)].__getitem__)
    assert [gpu.emulates_bfloat16 for gpu in usable_gpus(GpuReport(()))] == [True, False]
    play(monkeypatch, "xpu", None)
    assert not usable_gpus(GpuReport(()))[0].emulates_bfloat16


def test_compute_modes_of_nvml(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    monkeypatch.setattr(nvml, "nvmlDeviceGetComputeMode", lambda place: place, raising=False)
    gpus = visible_gpus({}).gpus
    assert [gpu.obstacle is None for gpu in gpus] == [True, True, False, True]
    assert [gpu.exclusive for gpu in gpus] == [False, True, False, True]
    assert [process.computes for process in gpus[1].processes] == [False]  # a graphics process
    monkeypatch.setattr("heretic.hardware.gpus._process_name", lambda *_: "nvidia-cuda-mps-server")
    assert not any(gpu.exclusive for gpu in visible_gpus({}).gpus)
    play(monkeypatch, "cuda", "2aaa-2", "0aaa-0")
    assert [gpu.uuid for gpu in inspect_gpus({})[1]] == ["GPU-0aaa-0"]


@pytest.mark.parametrize("toolkit", [None, "13.0"])
def test_gpus_that_only_nvml_lists_have_the_error_of_starting_on_them(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, toolkit: str | None
) -> None:
    started = []

    def init() -> None:
        started.append(1)
        raise RuntimeError("Error 802: system not yet initialized\nmore")

    hide(monkeypatch, built_for="cuda")
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    monkeypatch.setattr(torch.cuda, "init", init)
    report, usable = inspect_gpus({})
    assert usable == () and len(report.gpus) == 4 and len({gpu.obstacle for gpu in report.gpus}) == 1
    obstacle = report.gpus[0].obstacle
    assert obstacle is not None and len(started) == bool(toolkit)
    assert obstacle.text.endswith("Error 802: system not yet initialized") == bool(toolkit)


def test_a_gpu_without_memory_of_its_own_has_the_available_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(("GB10",), memory=NVMLError("Not Supported")))
    monkeypatch.setattr(devices, "memory", lambda: (120 * GIB, 90 * GIB))
    properties = SimpleNamespace(name="GB10", total_memory=100 * GIB, uuid="0aaa-0", is_integrated=1)
    play(monkeypatch, "cuda", "0aaa-0", free=7, total=100, get_device_properties=lambda _: properties)
    report, (gpu,) = inspect_gpus({})
    assert report.problem is None and (gpu.free, gpu.total, len(gpu.processes)) == (90 * GIB, 100 * GIB, 3)
    assert gpu.device.uses_ram and devices.free_bytes(torch.device("cuda:0")) == 90 * GIB
    monkeypatch.setattr(devices, "memory", lambda: (120 * GIB, 110 * GIB))
    assert gpus_here()[0].free == 100 * GIB
    hide(monkeypatch)
    assert len(visible_gpus({}).gpus) == 1 and [usage.device for usage in memory_usage()] == ["RAM"]


def test_a_gpu_whose_memory_only_pytorch_tells_keeps_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(("A100",), memory=NVMLError("Not Supported")))
    play(monkeypatch, "cuda", "0aaa-0")
    _, (gpu,) = inspect_gpus({})
    assert (gpu.free, gpu.total, len(gpu.processes)) == (5 * GIB, 8 * GIB, 3) and not gpu.device.uses_ram


def test_usable_gpus_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "cuda", "abc", None)
    found = usable_gpus(GpuReport((), "no NVIDIA driver"))
    assert [(gpu.uuid, gpu.name, gpu.total, gpu.free) for gpu in found] == [
        ("GPU-abc", "from torch", 8 * GIB, 5 * GIB),  # as NVML names it for another process
        ("cuda-1", "from torch", 8 * GIB, 5 * GIB),
    ]


def test_no_accelerator_means_nothing_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    report = GpuReport((Gpu(0, "GPU-0", "nvml", 24 * GIB, 20 * GIB),))
    hide(monkeypatch)
    assert usable_gpus(report) == ()

    def too_old(_: int) -> SimpleNamespace:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    play(monkeypatch, "cuda", "0", get_device_properties=too_old)
    assert usable_gpus(report) == ()


def test_a_run_locks_the_gpus_that_it_may_use() -> None:
    both = tuple(Gpu(i, f"GPU-{i}", "card", 1, 1) for i in range(2))
    assert gpus_for("planned", both) == gpus_for({"": 0}, both) == both
    assert gpus_for("cuda:1", both) == both[1:]
    assert gpus_for("cuda", both) == gpus_for("0", both) == both[:1]
    assert gpus_for("cpu", both) == gpus_for("cuda:7", both) == gpus_for("mps", both) == ()


def test_the_version_of_the_driver_where_there_is_one(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver_version() == "570.1" and nvml.open == 0
    install(monkeypatch, FakeNvml(init=NVMLError_LibraryNotFound()))
    assert driver_version() is None
