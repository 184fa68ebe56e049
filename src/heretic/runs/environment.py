"""What a report of a fault should say about the machine and the settings, without secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from heretic._version import __version__
from heretic.hardware.gpus import driver_version, usable_gpus, visible_gpus
from heretic.hardware.host import format_bytes, free_disk, memory
from heretic.runs.folder import settings_text
from heretic.settings.sources import Resolved

PACKAGES = ("torch", "transformers", "accelerate", "optuna", "datasets", "safetensors", "tokenizers")

# Set by the user and of influence, but nothing that could be a token or a password.
REPORTED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "HF_HUB_OFFLINE",
    "PYTORCH_CUDA_ALLOC_CONF",
)

OPTIONAL = ("numpy", "pydantic", "peft", "gguf", "bitsandbytes", "lm_eval", "psycopg", "boto3", "nvidia-ml-py")


def collect(resolved: Resolved | None, problem: str, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Versions, devices, memory, environment and settings; `problem` says why there are no settings."""
    total, free = memory()
    report = visible_gpus(environment)
    usable = {gpu.uuid for gpu in usable_gpus(report)}
    gpus = [
        f"{gpu.name}, {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free"
        + ("" if gpu.uuid in usable else ", not usable with this PyTorch")
        for gpu in report.gpus
    ]
    return {
        "versions": versions() | _optional() | _of_cuda(),
        "cpu_cores": os.cpu_count(),
        "ram": f"{format_bytes(free)} of {format_bytes(total)} free",
        "disk": f"{format_bytes(free_disk(Path.cwd()))} free here",
        "gpus": gpus or [report.problem or "none"],
        "environment": {name: environment[name] for name in REPORTED_VARIABLES if name in environment},
        "settings": settings_text(resolved) if resolved else problem,
    }


def _optional() -> dict[str, str]:
    """Versions of the packages that only some of the work needs, and that may be missing."""
    found = {}
    for package in OPTIONAL:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _of_cuda() -> dict[str, str]:
    """What PyTorch was built for, and the driver that it finds."""
    found = {"CUDA of PyTorch": torch.version.cuda, "NVIDIA driver": driver_version()}
    return {name: version for name, version in found.items() if version}


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"heretic": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def computed_on(device: torch.device) -> str:
    """What does the arithmetic, as far as the last bits of a sum depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
