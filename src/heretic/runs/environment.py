"""Collect versions, hardware and settings for bug reports, without secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from heretic._version import __version__
from heretic.hardware import devices
from heretic.hardware.gpus import Gpu, driver_version, inspect_gpus
from heretic.hardware.host import format_bytes, free_disk, memory
from heretic.runs.folder import settings_text
from heretic.settings.sources import Resolved

PACKAGES = ("torch", "transformers", "accelerate", "optuna", "datasets", "safetensors", "tokenizers")

# Variables that affect a run and cannot contain a token or a password.
REPORTED_VARIABLES = (*devices.VARIABLES, "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE")

OPTIONAL = ("numpy", "pydantic", "peft", "gguf", "bitsandbytes", "lm_eval", "psycopg", "boto3", *devices.PACKAGES)


def collect(resolved: Resolved | None, problem: str) -> dict[str, Any]:
    """Collect versions, devices, memory, environment and settings; `problem` replaces missing settings."""
    total, free = memory()
    report, usable = inspect_gpus(os.environ)
    gpus = [f"{gpu.name} ({gpu.device.name}), {_free(gpu)}" for gpu in usable]
    known = {gpu.uuid for gpu in usable}
    gpus += [
        f"{gpu.name}, {_free(gpu)}, not usable{f': {gpu.obstacle.text}' if gpu.obstacle else ' with the installed PyTorch'}"
        for gpu in report.gpus
        if gpu.uuid not in known
    ]
    return {
        "versions": versions() | _optional_versions() | _accelerator_versions(),
        "cpu_cores": os.cpu_count(),
        "ram": f"{format_bytes(free)} of {format_bytes(total)} free",
        "disk": f"{format_bytes(free_disk(Path.cwd()))} free here",
        "gpus": [*gpus, *([report.problem] if report.problem else [])] or ["none"],
        "environment": {name: os.environ[name] for name in REPORTED_VARIABLES if name in os.environ},
        "settings": settings_text(resolved) if resolved else problem,
    }


def _optional_versions() -> dict[str, str]:
    installed = {}
    for package in OPTIONAL:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def _accelerator_versions() -> dict[str, str]:
    driver = driver_version()
    return devices.build_versions() | ({"NVIDIA driver": driver} if driver else {})


def _free(gpu: Gpu) -> str:
    if not gpu.total:
        return "memory unknown"
    return f"{format_bytes(gpu.free)} of {format_bytes(gpu.total)} free"


def versions() -> dict[str, str]:
    """Return the versions of heretic, Python, the platform and the packages that affect results."""
    own = {"heretic": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def computed_on(device: torch.device) -> str:
    """Return the hardware that affects the rounding of results: the GPU's name, or CPU capability and threads."""
    if devices.is_accelerator(device):
        return devices.title_of(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def now() -> str:
    """Return the time in UTC, in ISO format with seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
