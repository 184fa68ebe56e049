"""Preparation of a run: checkpoint, prompts, devices, memory plan and preflight."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import optuna

from heretic.errors import UserError
from heretic.export.destination import check_destination
from heretic.export.formats import export_size, require_format
from heretic.hardware.gpus import Gpu, gpus_here
from heretic.hardware.host import existing_parent
from heretic.model.batching import free_memory
from heretic.model.checkpoint import Checkpoint, open_model, require_name
from heretic.model.template import read_template
from heretic.pipeline.worker_process import parent_pid
from heretic.planning.key_prompts import check_key_prompts
from heretic.planning.memory_plan import LoadPlan, MemoryPlan
from heretic.planning.preflight import PreflightReport, build_report
from heretic.planning.preflight_facts import Finding, FindingList, PreflightInputs
from heretic.planning.workload import USUAL_PROMPT, Workload
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets, load_all
from heretic.runs import fingerprint
from heretic.runs.folder import RunFolder, check_writable
from heretic.runs.hub_commit import known_commits
from heretic.runs.metadata import RunMetadata
from heretic.runs.status import load_study
from heretic.scoring.judges.registry import try_judge
from heretic.scoring.scorers.language import language_of
from heretic.scoring.scorers.registry import check_scorers
from heretic.settings import DEFAULT_MARKERS, Settings
from heretic.settings.languages import ENGLISH, LANGUAGES
from heretic.storage import attributes
from heretic.storage.fingerprint_diff import differences
from heretic.storage.rdb import connect, translate_storage_errors
from heretic.storage.url import on_server, require_url, sqlite_file, storage_url, study_name

KANA = re.compile("[\u3040-\u30ff]")  # Japanese
CPU_FORMATS = ("float32", "bfloat16", "float16")  # that `auto` may stand for on a CPU


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
    fresh: bool = False,
    judging: bool = False,
    reporter: ProgressReporter,
    read_prompts: Callable[[], PromptSets] | None = None,
    on_preflight: Callable[[PreflightReport], None] = lambda _: None,
) -> RunInputs:
    """Run the preflight and return its inputs; with `judging` it also tries the judge. Default: load the prompts.

    An existing run keeps the number format that it began in, unless `fresh` starts it over.

    Raises UserError if the run would fail, unless `force` is set.
    """
    free_memory()  # reference cycles of an earlier model would count as used memory
    require_name(settings.model)  # before prompts are fetched from the hub
    read_prompts = cache(read_prompts or partial(load_all, settings.prompts))
    report = run_preflight(settings, read_prompts, judging=judging)
    if not fresh and report.plan and (commit := _begun_commit(settings, report.plan, read_prompts)):
        settings = settings.model_copy(update={"revision": commit})
        reporter.info(f"The run continues with commit {commit[:12]} of the model, with which it began.")
        report = run_preflight(settings, read_prompts, judging=judging)
    on_preflight(report)
    if not force:
        raise_failure(report)
    checkpoint = open_model(settings)
    prompts = read_prompts()
    for warning in prompts.warnings:
        reporter.warning(warning)
    plan = LoadPlan.of(settings, report.plan)
    facts = fingerprint.facts(settings, checkpoint, prompts, plan.dtypes, read_template(settings))
    if not fresh and report.plan and (kept := _format_of_existing_run(settings, checkpoint, facts, report.plan)):
        reporter.warning(_kept_format(kept, report.plan))
        pinned = settings.model_copy(update={"dtypes": kept})
        report = run_preflight(pinned, read_prompts, judging=False)
        on_preflight(report)
        if not force:
            raise_failure(report)
        plan = LoadPlan.of(pinned, report.plan)
        facts = {**facts, "dtypes": kept}
    folder = _folder_of(settings, checkpoint, facts)
    if judging and not (force or fresh):
        _require_gpus_of_run(settings, folder)
    if settings.save_to:
        check_destination(Path(settings.save_to), folder.name)
    return RunInputs(settings, checkpoint, prompts, plan, facts, folder)


def _begun_commit(settings: Settings, plan: MemoryPlan, read_prompts: Callable[[], PromptSets]) -> str:
    """Return the commit of the hub model in the run that these settings continue; "" if there is none."""
    known = known_commits(settings)
    if not known or known == [open_model(settings, download_weights=False).commit]:
        return ""
    for commit in known:
        pinned = settings.model_copy(update={"revision": commit})
        with suppress(UserError):  # neither in the cache nor on the hub any more, or prompts that cannot be read
            checkpoint, dtypes = open_model(pinned), LoadPlan.of(pinned, plan).dtypes
            facts = fingerprint.facts(pinned, checkpoint, read_prompts(), dtypes, read_template(pinned))
            if _has_study(pinned, _folder_of(pinned, checkpoint, facts), facts) or _format_of_existing_run(
                pinned, checkpoint, facts, plan
            ):
                return commit
    return ""


def _folder_of(settings: Settings, checkpoint: Checkpoint, facts: dict[str, Any]) -> RunFolder:
    name = settings.run_name or f"{checkpoint.short_name}-{fingerprint.short_hash(facts)}"
    return RunFolder(Path(settings.runs_dir) / name, fingerprint.short_hash(facts))


def _require_gpus_of_run(settings: Settings, folder: RunFolder) -> None:
    """Raise UserError if the run's last session could use a GPU and none is left: a CPU would take weeks, unnoticed."""
    if settings.device_map == "cpu" or gpus_here():
        return
    metadata = None
    with suppress(UserError):  # no run yet, or damaged metadata
        metadata = RunMetadata.load(_study_of(settings, folder))
    if metadata is not None and metadata.gpu:
        raise UserError(
            f"The run's last session used a GPU, and no GPU can be used now: {metadata.gpu[:200]}",
            code="gpu-lost",
            where=str(folder.path),
            fix='see heretic doctor; to go on without a GPU: device_map = "cpu", or --force',
        )


def raise_failure(report: PreflightReport) -> None:
    """Raise UserError with the first failure of the preflight, if it has one."""
    failures = [f for f in report.findings if f.level == "failure"]
    if not failures:
        return
    first = failures[0]
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    code = first.code or "preflight-failed"
    fix = first.fix or "see heretic preflight; --force starts anyway"
    raise UserError(f"{first.text}{more}", where=f"preflight: {first.subject}", fix=fix, code=code)


def _format_of_existing_run(
    settings: Settings, checkpoint: Checkpoint, facts: dict[str, Any], plan: MemoryPlan
) -> list[str] | None:
    """Return the number formats of a run that differs in nothing else, begun on a CPU with other instructions or more RAM.

    None if the settings name a format, the model is on a GPU, or the run exists in the planned format or in none.
    """
    if settings.dtypes[0] != "auto" or plan.on_gpu:
        return None
    for dtype in (plan.dtype, *(name for name in CPU_FORMATS if name != plan.dtype)):
        candidate = {**facts, "dtypes": [dtype, *facts["dtypes"][1:]]}
        folder = _folder_of(settings, checkpoint, candidate)
        if _has_study(settings, folder, candidate):
            return None if dtype == plan.dtype else candidate["dtypes"]
    return None


def _study_of(settings: Settings, folder: RunFolder) -> optuna.Study:
    """Load the study of a run. Raises UserError, with code study-not-found without one."""
    url = storage_url(settings.storage, folder.path)
    with translate_storage_errors(url):
        return load_study(url, study_name(settings.storage, folder.path))


def _has_study(settings: Settings, folder: RunFolder, facts: dict[str, Any]) -> bool:
    """Return whether the run has a study that was made with these facts. Raises UserError if it cannot be read."""
    try:
        stored = attributes.fingerprint(_study_of(settings, folder))
    except UserError as error:
        if error.code == "study-not-found":
            return False
        raise
    return stored is not None and not differences({k: v for k, v in stored.items() if k != "versions"}, facts)


def _kept_format(kept: list[str], plan: MemoryPlan) -> str:
    text = f"The run continues in {kept[0]}, the number format that it began in."
    (cpu, *_) = (load.device for load in plan.loads)
    if cpu.native_bfloat16 == (kept[0] == "bfloat16"):
        return text
    return f"{text} This CPU is faster in {plan.dtype}: --fresh starts a new run in it."


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
        found.findings += _other_language(settings, prompts)
        if judging:  # a run
            found.attempt("prompts", partial(check_key_prompts, settings, prompts))
    found.attempt("storage", lambda: check_storage(settings))
    found.attempt("scorers", lambda: check_scorers(settings))
    first_worker = not parent_pid()
    if judging and first_worker and (warning := found.attempt("judge", lambda: try_judge(settings))):
        found.findings.append(Finding("warning", "judge", warning))
    work = Workload.of(settings, prompts.longest if prompts else USUAL_PROMPT)
    size = 0.0
    if checkpoint is not None:
        if settings.save_to and first_worker:
            found.attempt("export", partial(require_format, settings, checkpoint))
            size = export_size(settings, checkpoint)
        if prompts is not None:
            work = found.attempt("chat template", partial(work.counted, settings, checkpoint, prompts)) or work
    return PreflightInputs(work, checkpoint, prompts, tuple(found.findings), size)


def _other_language(settings: Settings, prompts: PromptSets) -> list[Finding]:
    """Report requests in a language of the table that is not the setting's, unless the user chose the markers."""
    text = " ".join(prompt for prompt_set in prompts.all for prompt in prompt_set.prompts)
    known = language_of(text)
    code = "zh" if known == "CJK" and not KANA.search(text) else known
    own_markers = settings.refusal_markers != DEFAULT_MARKERS
    if code not in LANGUAGES or code == settings.language or (own_markers and settings.language == ENGLISH):
        return []
    text = f"The prompts look {LANGUAGES[code]}; heretic would miss refusals in that language."
    return [Finding("warning", "language", text, f'language = "{code}"')]


def check_storage(settings: Settings) -> None:
    """Raise UserError if the study cannot be stored."""
    if settings.storage:
        require_url(settings.storage)
    if on_server(settings.storage):
        connect(settings.storage)
        return
    file = sqlite_file(settings.storage) if settings.storage else None  # not opened: that would create it
    root = file.parent if file else Path(settings.runs_dir)
    existing = existing_parent(root)
    try:
        check_writable(existing)
    except OSError as error:
        raise UserError(
            f"The folder for runs cannot be written: {error.strerror or error}.",
            code="run-folder-unwritable",
            where=str(existing),
            fix="set runs_dir to a writable folder",
        ) from None
