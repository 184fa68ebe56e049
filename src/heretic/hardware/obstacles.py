"""Why a GPU is left out, and what to do about it: what PyTorch and the driver say, in plain words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# What to install for a compute capability that a build of PyTorch lacks, by the first capability that it is not for.
WHEELS = (
    ((5, 0), "use another GPU: no current PyTorch supports it"),
    (
        (7, 5),
        "install an older build: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126",
    ),
    ((10, 0), ""),  # in all usual builds
)
NEWER_WHEELS = (
    "install a newer build: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
)

# The driver's error numbers, in PyTorch's text: the fabric of NVSwitch is not up; after an update or a suspended machine the
# parts of the driver do not fit together.
NO_FABRIC = re.compile(r"\b802\b|system not yet initialized")
BROKEN_STATE = re.compile(r"\b(999|803|804)\b|forward compatibility was attempted")
OLD_DRIVER = re.compile(r"driver on your system is too old \(found version (\d+)\)")


@dataclass(frozen=True)
class Obstacle:
    """Why a GPU is left out, and what to do; `fails`: without another GPU a run fails, else it uses the CPU."""

    text: str
    fix: str
    fails: bool = True


def missing_kernels(capability: tuple[int, int], built: Sequence[str], torch: str, install: str) -> Obstacle | None:
    """Return the obstacle of a GPU that PyTorch has no kernels for; None if it has, or its build does not tell.

    Args:
        capability: the GPU's compute capability.
        built: what PyTorch is built for, such as `sm_86` or `compute_120`.
        torch: PyTorch's version.
        install: how to get a usual build.
    """
    if not built or any(_runs(entry, capability) for entry in built):
        return None
    number = ".".join(map(str, capability))
    text = f"compute capability {number}, but PyTorch {torch} has kernels for {', '.join(built)} only"
    return Obstacle(text, next((fix for limit, fix in WHEELS if capability < limit), NEWER_WHEELS) or install)


def start_failure(error: str, torch: str, toolkit: str | None, install: str) -> Obstacle:
    """Return the obstacle of GPUs that the driver lists and PyTorch does not.

    Args:
        error: what starting PyTorch on them says; empty if nothing.
        torch: PyTorch's version.
        toolkit: the version of NVIDIA's toolkit that PyTorch is built for; None without.
        install: how to get a usual build.
    """
    if toolkit is None:
        text, fix = f"PyTorch {torch} is built for other devices", install
    elif old := OLD_DRIVER.search(error):
        found = f"{int(old[1]) // 1000}.{int(old[1]) % 1000 // 10}"
        text = f"the driver is too old: it supports version {found}, PyTorch {torch} needs {toolkit}"
        fix = f"update the driver, or {install}"
    else:
        said = re.sub(r"^Unexpected error from .*(?=Error \d)", "", error)
        text = f"PyTorch {torch} does not start on it: {said or 'it finds no device'}"
        fix = "run nvidia-smi; if it shows the GPU, reinstall the driver"
        if NO_FABRIC.search(error):
            fix = "sudo systemctl start nvidia-fabricmanager (of the driver's version)"
        elif BROKEN_STATE.search(error):
            fix = "reboot, or reload the driver's module: sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm"
    return Obstacle(text, fix, fails=False)


def _runs(entry: str, capability: tuple[int, int]) -> bool:
    """Return whether code of an entry runs on a GPU: `sm_` within its major, `compute_` (PTX) above; with `a` on its own only."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)f?", entry)
    if match is None:
        return False
    own = int(match[2]), int(match[3])
    if match[4]:
        return own == capability
    return own <= capability and (match[1] == "compute" or own[0] == capability[0])
