"""Collect versions, hardware and settings for bug reports, without secrets."""

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

# Variables that affect a run and cannot contain a token or a password.
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
    """Collect versions, devices, memory, environment and settings; `problem` replaces missing settings."""
    total, free = memory()
    report = visible_gpus(environment)
    usable = {gpu.uuid for gpu in usable_gpus(report)}
    gpus = [
        f"{gpu.name}, {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free"
        + ("" if gpu.uuid in usable else ", not usable with the installed PyTorch")
        for gpu in report.gpus
    ]
    return {
        "versions": versions() | _optional_versions() | _cuda_versions(),
        "cpu_cores": os.cpu_count(),
        "ram": f"{format_bytes(free)} of {format_bytes(total)} free",
        "disk": f"{format_bytes(free_disk(Path.cwd()))} free here",
        "gpus": gpus or [report.problem or "none"],
        "environment": {name: environment[name] for name in REPORTED_VARIABLES if name in environment},
        "settings": settings_text(resolved) if resolved else problem,
    }


def _optional_versions() -> dict[str, str]:
    installed = {}
    for package in OPTIONAL:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def _cuda_versions() -> dict[str, str]:
    present = {"CUDA of PyTorch": torch.version.cuda, "NVIDIA driver": driver_version()}
    return {name: version for name, version in present.items() if version}


def versions() -> dict[str, str]:
    """Return the versions of heretic, Python, the platform and the packages that affect results."""
    own = {"heretic": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def computed_on(device: torch.device) -> str:
    """Return the hardware that affects the rounding of results: the GPU's name, or CPU capability and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def now() -> str:
    """Return the time in UTC, in ISO format with seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
