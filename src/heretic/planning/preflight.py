"""Check whether a run can succeed: memory, GPUs, locks and disks, without loading anything."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from heretic.files import expand_user
from heretic.hardware import host
from heretic.hardware.devices import Device
from heretic.hardware.gpus import Gpu, GpuReport, gpus_for, inspect_gpus
from heretic.hardware.locks import LockOwner, device_locks, lock_owner
from heretic.model.checkpoint import Checkpoint
from heretic.planning.memory_plan import MemoryPlan, plan_for
from heretic.planning.preflight_facts import Finding, FindingList, Folder, PreflightFacts, PreflightInputs
from heretic.planning.rules import RULES
from heretic.planning.workload import Workload
from heretic.settings import Settings


@dataclass(frozen=True)
class PreflightReport:
    """The result of the preflight; `plan` is None if the model could not be read or placed."""

    model: str
    gpus: GpuReport
    plan: MemoryPlan | None
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Literal["ready", "risky", "fail"]:
        """`fail` if a finding is a failure, `risky` if one is a warning, else `ready`."""
        levels = {finding.level for finding in self.findings}
        return "fail" if "failure" in levels else "risky" if "warning" in levels else "ready"

    @property
    def exit_status(self) -> int:
        """0 for ready, 1 for fail, 2 for risky."""
        return {"ready": 0, "fail": 1, "risky": 2}[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "gpus": asdict(self.gpus),
            "plan": self.plan.as_dict() if self.plan else None,
            "findings": [asdict(finding) for finding in self.findings],
        }


def build_report(
    settings: Settings,
    inputs: PreflightInputs,
    *,
    virtual: tuple[Gpu, ...] = (),
    placed: bool = True,
) -> PreflightReport:
    """Plan the memory and apply all rules.

    Args:
        settings: the settings of the run.
        inputs: model, prompts and workload, and the findings so far.
        virtual: virtual GPUs to plan for, instead of the machine's.
        placed: whether the whole model is placed; else it is read block by block, and no rule on memory applies.
    """
    found = FindingList(list(inputs.findings))
    checkpoint, work = inputs.checkpoint, inputs.work
    # 1. Devices
    report, usable = (GpuReport(virtual), virtual) if virtual else inspect_gpus(os.environ)
    if usable:  # without those that only NVML lists, whose numbers are others
        report = replace(report, gpus=tuple(gpu for gpu in report.gpus if gpu in usable or gpu.obstacle))
    devices = host.devices(usable)
    # 2. Memory plan
    plan = None
    if checkpoint is not None and placed:
        plan = found.attempt("memory", partial(plan_for, settings, checkpoint, work, devices))
    # 3. Rules
    facts = PreflightFacts(
        settings=settings,
        report=report,
        usable=usable,
        ram=devices[-1].free,
        checkpoint=checkpoint,
        plan=plan,
        prompt_warnings=tuple(inputs.prompts.warnings) if inputs.prompts else (),
        holders=found.attempt("lock", lambda: _holders(settings, usable)) or (),
        run_folder=_folder(Path(settings.runs_dir)),
        export_folder=_export_folder(Path(settings.save_to)) if settings.save_to else None,
        hub_cache=_folder(_hub_cache()),
        fitting_quantization=_fitting(settings, checkpoint, plan, work, devices),
        largest_file=checkpoint.largest_file if checkpoint else 0,
        downloaded_bytes=checkpoint.downloaded_bytes if checkpoint and not checkpoint.is_local else 0,
        export_bytes=inputs.export_bytes,
        mappable=None if virtual else host.mappable(),
    )
    findings = [finding for rule in RULES for finding in rule(facts)]
    return PreflightReport(settings.model, report, plan, (*found.findings, *findings))


def _fitting(
    settings: Settings, checkpoint: Checkpoint | None, plan: MemoryPlan | None, work: Workload, devices: list[Device]
) -> str | None:
    """Return the quantization with the most bits that makes the model fit on the GPUs; None if it fits or none helps."""
    if checkpoint is None or plan is None or (plan.fits and not plan.in_ram) or not devices[0].is_gpu:
        return None
    if settings.quantization != "none" or checkpoint.quantized_by or checkpoint.gguf_file:
        return None
    for name in ("bnb_8bit", "bnb_4bit"):
        update = {"quantization": name, "device_map": "planned", "apply": "operators"}
        if plan_for(settings.model_copy(update=update), checkpoint, work, devices).fits:
            return name
    return None


def _holders(settings: Settings, usable: tuple[Gpu, ...]) -> tuple[tuple[str, LockOwner], ...]:
    """Return the devices of this run that another process has locked, with the lock owners."""
    gpus = gpus_for(settings.device_map, usable)
    names = [gpu.device.name for gpu in gpus] or ["The CPU"]
    owners = [
        (name, lock_owner(path)) for name, path in zip(names, device_locks([gpu.uuid for gpu in gpus]), strict=True)
    ]
    return tuple((name, owner) for name, owner in owners if owner and not owner.is_this_process)


def _folder(path: Path) -> Folder:
    path = expand_user(path)
    filled = path.exists() and not path.is_dir()
    if path.is_dir() and os.access(path, os.R_OK):
        filled = any(path.iterdir()) and not (path / "manifest.json").is_file()
    disk = host.existing_parent(path).stat().st_dev
    return Folder(str(path), host.free_disk(path), host.can_write(path), filled, disk=disk)


def _export_folder(path: Path) -> Folder:
    """Return the folder of an export, which is written beside it and then renamed."""
    resolved = Path(os.path.realpath(expand_user(path)))
    free, writable = host.free_disk(resolved.parent), host.can_write(resolved.parent)
    shown = os.path.abspath(expand_user(path))  # a rule adds to it, which `.` would not survive
    mounted, disk = host.is_mount_point(resolved), host.existing_parent(resolved.parent).stat().st_dev
    return replace(_folder(path), path=shown, free=free, writable=writable, mounted=mounted, disk=disk)


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
