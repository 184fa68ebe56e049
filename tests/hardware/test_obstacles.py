"""Which GPUs a build of PyTorch has kernels for, and why PyTorch does not start on others."""

from __future__ import annotations

import pytest

from heretic.hardware.obstacles import missing_kernels, start_failure

WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), WHEEL, False),
        ((7, 5), WHEEL, True),
        ((8, 9), WHEEL, True),  # by sm_86
        ((12, 1), WHEEL, True),
        ((13, 0), WHEEL, True),  # the driver compiles compute_120
        ((10, 0), ("sm_80", "sm_90"), False),  # machine code stays within its major
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("compute_90a",), False),  # only for its own kind
        ((7, 0), ("compute_75",), False),
        ((10, 3), ("sm_100f",), True),
        ((3, 0), (), True),  # unknown
        ((8, 0), ("gfx90a",), False),
    ],
)
def test_kernels_run_within_their_major_and_ptx_above_it(
    capability: tuple[int, int], built: tuple[str, ...], runs: bool
) -> None:
    assert (missing_kernels(capability, built, "2.9", "install") is None) == runs


@pytest.mark.parametrize(
    ("capability", "fix"), [((3, 5), "another GPU"), ((6, 1), "cu126"), ((8, 0), "install CUDA"), ((12, 0), "cu128")]
)
def test_the_fix_names_a_build_that_has_them(capability: tuple[int, int], fix: str) -> None:
    obstacle = missing_kernels(capability, ["sm_90"], "2.9", "install CUDA")
    assert obstacle is not None and obstacle.fails and fix in obstacle.fix


UNEXPECTED = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices()? "
)


@pytest.mark.parametrize(
    ("error", "toolkit", "fix"),
    [
        ("", None, "install CUDA"),
        (
            "The NVIDIA driver on your system is too old (found version 12020). Please update",
            "13.0",
            "update the driver",
        ),
        (f"{UNEXPECTED}Error 802: system not yet initialized", "13.0", "nvidia-fabricmanager"),
        (f"{UNEXPECTED}Error 999: unknown error", "13.0", "nvidia_uvm"),
        (f"{UNEXPECTED}Error 804: forward compatibility was attempted on non supported HW", "13.0", "nvidia_uvm"),
        ("something new", "13.0", "nvidia-smi"),
        ("", "13.0", "nvidia-smi"),
    ],
)
def test_what_does_not_start_is_fixed_by_its_cause(error: str, toolkit: str | None, fix: str) -> None:
    obstacle = start_failure(error, "2.9", toolkit, "install CUDA")
    assert fix in obstacle.fix and obstacle.text and not obstacle.fails
    if "old" in error:
        assert "12.2" in obstacle.text and "13.0" in obstacle.text
    else:
        assert obstacle.text.endswith(error.removeprefix(UNEXPECTED)) and UNEXPECTED not in obstacle.text
