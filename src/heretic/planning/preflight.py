"""Can this run succeed here? Looks at model, memory, GPUs, locks, disks, prompts and storage without loading anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from heretic.errors import UserError
from heretic.files import expand_user
from heretic.hardware import host
from heretic.hardware.devices import Device
from heretic.hardware.gpus import Gpu, GpuReport, gpus_for, usable_gpus, visible_gpus
from heretic.hardware.locks import LockOwner, device_locks, lock_owner
from heretic.model.checkpoint import Checkpoint
from heretic.planning.memory_plan import MemoryPlan, plan_for
from heretic.planning.preflight_facts import Finding, Folder, PreflightFacts
from heretic.planning.rules import RULES
from heretic.planning.workload import Workload
from heretic.settings import Settings

USUAL_PROMPT = 600  # characters, where the prompts cannot be read

T = TypeVar("T")


@dataclass(frozen=True)
class PreflightReport:
    """What the preflight found; `plan` is None where the model could not be looked at or placed."""

    model: str
    gpus: GpuReport
    plan: MemoryPlan | None
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Literal["ready", "risky", "fail"]:
        """`fail` if anything is sure to go wrong, `risky` if something may."""
        levels = {finding.level for finding in self.findings}
        return "fail" if "failure" in levels else "risky" if "warning" in levels else "ready"

    @property
    def exit_status(self) -> int:
        """0 ready, 1 fail, 2 risky."""
        return {"ready": 0, "fail": 1, "risky": 2}[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "gpus": asdict(self.gpus),
            "plan": self.plan.as_dict() if self.plan else None,
            "findings": [asdict(finding) for finding in self.findings],
        }


def run_preflight(
    settings: Settings,
    *,
    checkpoint_loader: Callable[[], Checkpoint],
    prompt_loader: Callable[[], Any],
    storage_check: Callable[[], None],
    judge_check: Callable[[], str] = lambda: "",
    export_check: Callable[[Checkpoint], None] = lambda _checkpoint: None,
    work_counter: Callable[[Workload, Checkpoint, Any], Workload] = lambda work, _checkpoint, _prompts: work,
    environment: Mapping[str, str] = os.environ,
    virtual: tuple[Gpu, ...] = (),
) -> PreflightReport:
    """Find out what there is and apply all rules.

    `prompt_loader` returns an object with `warnings`, `counts` and `longest` (characters of the longest prompt), of
    which `work_counter` knows more. `judge_check` returns what is doubtful about the judge. `export_check` is asked
    where `save_to` is set. A UserError of any of them becomes a failure with its own remedy; other exceptions are defects and pass
    through. With `imagined` GPUs the plan is for these, and nobody holds them.
    """
    problems: list[Finding] = []

    def attempt(subject: str, ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except UserError as error:
            where = f" ({error.where})" if error.where else ""
            problems.append(Finding("failure", subject, error.what + where, error.fix, error.code))
            return None

    report = GpuReport(virtual) if virtual else visible_gpus(environment)
    usable = virtual or usable_gpus(report)
    if usable:  # numbered as PyTorch numbers them, and those that NVML does not know
        report = GpuReport(usable, report.problem)
    devices = host.devices(usable)
    checkpoint = attempt("model", checkpoint_loader)
    prompts = attempt("prompts", prompt_loader)
    if prompts is not None:
        problems.append(Finding("ok", "prompts", prompts.counts))
    attempt("storage", storage_check)
    if doubtful := attempt("judge", judge_check):
        problems.append(Finding("warning", "judge", doubtful))
    work = Workload.of(settings, prompts.longest if prompts else USUAL_PROMPT)
    plan = None
    if checkpoint is not None:
        opened, estimated = checkpoint, work
        if settings.save_to:
            attempt("export", lambda: export_check(opened))
        if prompts is not None:
            work = attempt("chat template", lambda: work_counter(estimated, opened, prompts)) or work
        plan = attempt("memory", lambda: plan_for(settings, opened, work, devices))
    facts = PreflightFacts(
        settings=settings,
        report=report,
        usable=usable,
        ram=devices[-1].free,
        checkpoint=checkpoint,
        plan=plan,
        prompt_warnings=tuple(prompts.warnings) if prompts else (),
        holders=attempt("lock", lambda: _holders(settings, usable)) or (),
        run_folder=_folder(Path(settings.runs_dir)),
        export_folder=_folder(Path(settings.save_to)) if settings.save_to else None,
        hub_cache=_folder(_hub_cache()),
        fitting_quantization=_fitting(settings, checkpoint, plan, work, devices),
        largest_file=checkpoint.largest_file if checkpoint else 0,
        mappable=None if virtual else host.mappable(),
    )
    found = [finding for rule in RULES for finding in rule(facts)]
    return PreflightReport(settings.model, report, plan, (*problems, *found))


def _fitting(
    settings: Settings, checkpoint: Checkpoint | None, plan: MemoryPlan | None, work: Workload, devices: list[Device]
) -> str | None:
    """A quantization with which the model fits, where it does not fit on GPUs as it is; the one with the most bits."""
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
    """Devices that another process holds: those that this run would lock."""
    gpus = gpus_for(settings.device_map, usable)
    names = [f"cuda:{gpu.index}" for gpu in gpus] or ["The CPU"]
    asked = [
        (name, lock_owner(path)) for name, path in zip(names, device_locks([gpu.uuid for gpu in gpus]), strict=True)
    ]
    return tuple((name, found) for name, found in asked if found and not found.is_this_process)


def _folder(path: Path) -> Folder:
    path = expand_user(path)
    filled = path.exists() and not path.is_dir()
    if path.is_dir() and os.access(path, os.R_OK):
        filled = any(path.iterdir()) and not (path / "manifest.json").is_file()
    return Folder(str(path), host.free_disk(path), host.can_write(path), filled)


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
