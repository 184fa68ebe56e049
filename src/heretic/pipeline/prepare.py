"""Preparation of a run: checkpoint, prompts, devices, memory plan and preflight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic.errors import UserError
from heretic.export.destination import check_destination
from heretic.export.formats import require_format
from heretic.hardware.gpus import Gpu
from heretic.model.batching import free_memory
from heretic.model.checkpoint import Checkpoint, open_model, require_name
from heretic.model.template import read_template
from heretic.pipeline import tensor_parallel
from heretic.pipeline.worker_process import parent_pid
from heretic.planning.memory_plan import LoadPlan
from heretic.planning.preflight import PreflightReport, build_report
from heretic.planning.preflight_facts import Finding, FindingList, PreflightInputs
from heretic.planning.workload import USUAL_PROMPT, Workload
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets, load_all
from heretic.runs import fingerprint
from heretic.runs.folder import RunFolder, check_writable
from heretic.scoring.judges.registry import try_judge
from heretic.settings import Settings
from heretic.storage.rdb import connect
from heretic.storage.url import on_server


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run; the model is not loaded yet."""

    settings: Settings
    checkpoint: Checkpoint
    prompts: PromptSets
    plan: LoadPlan
    facts: dict[str, Any]
    folder: RunFolder


def prepare_run(
    settings: Settings,
    *,
    force: bool,
    judging: bool = False,
    reporter: ProgressReporter,
    on_report: Callable[[PreflightReport], None] = lambda _: None,
) -> RunInputs:
    """Run the preflight and return its inputs; with `judging` it also tries the judge.

    Raises UserError if the run would fail, unless `force` is set.
    """
    free_memory()  # reference cycles of an earlier model would count as used memory
    require_name(settings.model)  # before prompts are fetched from the hub
    read_prompts = functools.cache(lambda: load_all(settings.prompts))
    report = run_preflight(settings, read_prompts, judging=judging)
    on_report(report)
    failures = [f for f in report.findings if f.level == "failure"]
    if failures and not force:
        first = failures[0]
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        code = first.code or "preflight-failed"
        fix = first.fix or "see heretic preflight; --force starts anyway"
        raise UserError(f"{first.text}{more}", where=f"preflight: {first.subject}", fix=fix, code=code)
    checkpoint = open_model(settings)
    tensor_parallel.check(checkpoint, settings)
    prompts = read_prompts()
    for warning in prompts.warnings:
        reporter.warning(warning)
    plan = LoadPlan.of(settings, report.plan)
    facts = fingerprint.facts(settings, checkpoint, prompts, plan.dtypes, read_template(settings))
    name = settings.run_name or f"{checkpoint.short_name}-{fingerprint.short_hash(facts)}"
    folder = RunFolder(Path(settings.runs_dir) / name, fingerprint.short_hash(facts))
    if settings.save_to:
        check_destination(Path(settings.save_to), folder.name)
    return RunInputs(settings, checkpoint, prompts, plan, facts, folder)


def run_preflight(
    settings: Settings,
    read_prompts: Callable[[], PromptSets] | None = None,
    virtual: tuple[Gpu, ...] = (),
    *,
    judging: bool = True,
) -> PreflightReport:
    """Run the preflight; `read_prompts` lets the caller reuse the prompts, `virtual` GPUs stand for another machine."""
    return build_report(settings, read_inputs(settings, read_prompts, judging=judging), virtual=virtual)


def read_inputs(
    settings: Settings, read_prompts: Callable[[], PromptSets] | None = None, *, judging: bool = True
) -> PreflightInputs:
    """Open the checkpoint without its weights, read the prompts, and check judge, storage and export format."""
    found = FindingList()
    checkpoint = found.attempt("model", lambda: open_model(settings, download_weights=False))
    prompts = found.attempt("prompts", read_prompts or (lambda: load_all(settings.prompts)))
    if prompts is not None:
        found.findings.append(Finding("ok", "prompts", prompts.counts))
    found.attempt("storage", lambda: check_storage(settings))
    first_worker = not parent_pid()
    if judging and first_worker and (warning := found.attempt("judge", lambda: try_judge(settings))):
        found.findings.append(Finding("warning", "judge", warning))
    work = Workload.of(settings, prompts.longest if prompts else USUAL_PROMPT)
    if checkpoint is not None:
        opened, estimated = checkpoint, work
        if settings.save_to and first_worker:
            found.attempt("export", lambda: require_format(settings, opened))
        if prompts is not None:
            read = prompts
            work = found.attempt("chat template", lambda: estimated.counted(settings, opened, read)) or work
    return PreflightInputs(work, checkpoint, prompts, tuple(found.findings))


def check_storage(settings: Settings) -> None:
    """Raise UserError if the study cannot be stored."""
    if on_server(settings.storage):
        connect(settings.storage)
        return
    file = settings.storage.removeprefix("sqlite:///")  # not opened: that would create it
    root = Path(file).parent if file else Path(settings.runs_dir)
    existing = next(p for p in (root, *root.resolve().parents) if p.exists())
    try:
        check_writable(existing)
    except OSError as error:
        raise UserError(
            f"The folder for runs cannot be written: {error.strerror or error}.",
            code="run-folder-unwritable",
            where=str(existing),
            fix="set runs_dir to a writable folder",
        ) from None
