"""Export a selected trial: plan while the model is loaded, then write and verify after unloading it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from heretic.ablation.ablation import Ablation
from heretic.ablation.geometries import GEOMETRIES
from heretic.errors import UserError
from heretic.export.base_card import read_base_card
from heretic.export.card import card
from heretic.export.companions import copy_license_files
from heretic.export.destination import check_unchanged, commit, disk_error, not_moved, staging_dir
from heretic.export.formats import FORMATS
from heretic.export.full_precision_reference import to_full_precision
from heretic.export.manifest import DIRECTIONS, MANIFEST, OPERATORS, comparisons_of, inventory_of, scores_text
from heretic.export.request import EditJob, ExportJob, Format, WriteResult
from heretic.export.spot_check import check_edits
from heretic.export.verify import Verification, verify
from heretic.files import expand_user, sha256, write_tensors, write_text
from heretic.interrupt import StopSignal
from heretic.model.batching import free_memory
from heretic.model.quantization import QUANTIZATIONS
from heretic.model.template import read_template
from heretic.planning.memory_plan import LoadPlan
from heretic.progress import ProgressReporter
from heretic.runs.environment import computed_on, now, versions
from heretic.runs.folder import RunFolder, write_directions
from heretic.runs.stored_tensors import operator_tensors
from heretic.scoring.scorers.registry import choose_scorers
from heretic.scoring.scores import Scores
from heretic.search.pareto import Result
from heretic.session.session import Session
from heretic.settings import Settings

log = logging.getLogger(__name__)

AS_WRITTEN = "Scores of this model, reloaded from its files. "
CONVERTED = "Scores of the model folder that this file was converted from, so without the rounding of the file's type. "
UNMEASURED = """\
**Nothing was measured.** The model was edited block by block from its files and never loaded as a whole: heretic has seen no
answer of it, and neither refusals nor the KL divergence are known. It compared {tensors} edited tensors with the definition of the
edit. Measure the model before you use it (`heretic evaluate`)."""


@dataclass(frozen=True)
class Export:
    """A written and verified model."""

    destination: Path
    verification: Verification
    trial: int

    def as_dict(self) -> dict[str, Any]:
        """Return the data for --json."""
        verification = self.verification
        return {
            "written_to": str(self.destination),
            "of_trial": self.trial,
            "scores": scores_text(verification.scores) if verification.scores else None,
            "measures": [comparison.as_dict() for comparison in verification.comparisons],
            "verification": verification.as_dict(),
        }


def plan_export(
    session: Session, plan: LoadPlan, ablation: Ablation, result: Result, folder: RunFolder, destination: Path
) -> ExportJob:
    """Plan the export, and record the ablated model's log-probabilities to verify it with. Raises UserError."""
    if not math.isfinite(result.scores.divergence.mean):
        which = f"Trial {result.number}" if result.number >= 0 else "The ablation"
        raise UserError(
            f"{which} destroyed the model: its logits are not finite for some prompts.",
            code="logits-not-finite",
            fix="choose another trial",
        )
    model_context = session.context
    model = model_context.language_model
    operators = session.operator_factory.operators(ablation)
    name = model_context.settings.export_format
    of_one, of_two = model_context.chosen.by_models(model_context.chosen.exported)
    return ExportJob(
        format=name,
        settings=model_context.settings,
        checkpoint=model.checkpoint,
        prompts=model_context.prompts,
        plan=replace(plan, dtypes=[model.dtype], batch_size=model_context.batcher.size),
        folder=folder,
        destination=expand_user(destination).resolve(),
        trial=result.number,
        params=result.params,
        ablation=ablation,
        directions=session.operator_factory.directions,
        computed_on=computed_on(model.device),
        start=session.baseline.start,
        scores=result.scores,
        operators=operators,
        prepared=FORMATS[name].prepare(model, operators, model_context.settings, model_context.batcher.reporter),
        baseline=session.baseline,
        attached=session.log_probs(ablation),
        ablated_by=result.scores.divergence.mean,
        judge=model_context.evaluator.judge,
        comparisons=session.compare(ablation, of_two),
        originals=model_context.measurer.originals(of_one),
    )


def write_export(job: EditJob, reporter: ProgressReporter, stop: StopSignal) -> Export:
    """Write to a staging folder, verify, add card and manifest, and move into place. Raises UserError and VerificationFailed.

    Of an `EditJob` only the tensors are verified; nothing is loaded or measured.
    """
    free_memory()
    check_unchanged(job.destination, stop)
    partial = staging_dir(job.destination)
    try:
        export = _write(job, partial, reporter, stop)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # gigabytes in a hidden folder
        if isinstance(error, (OSError, SafetensorError)):
            raise disk_error(error, partial) from None
        raise
    try:
        commit(partial, job.destination, reporter)
    except OSError as error:
        raise not_moved(error, partial, job.destination) from None
    log.info("exported trial %s to %s", job.trial, job.destination)
    return export


def _write(job: EditJob, partial: Path, reporter: ProgressReporter, stop: StopSignal) -> Export:
    form = FORMATS[job.format]
    studied = job.plan.quantization
    if studied != "none" and form.full_precision and isinstance(job, ExportJob):
        job = to_full_precision(job, reporter, stop)
    # 1. Write the weights.
    written = form.write(job, partial, reporter, stop)
    free_memory()
    # 2. Verify edited tensors one by one, then the answers of the reloaded model.
    read = form.read_back(job, partial) if form.read_back else None
    checked = check_edits(job.checkpoint, job.operators, read, reporter, stop) if read else 0
    verification = Verification(tensors_checked=checked)
    if isinstance(job, ExportJob):
        verification = replace(verify(job, form.open(job, partial), written, reporter, stop), tensors_checked=checked)
    # 3. Convert, if the format has a conversion.
    if form.convert:
        written = form.convert(job, partial, written, reporter, stop)
    # 4. Add licenses, directions, card and manifest.
    copy_license_files(job.checkpoint.folder, partial, read_template(job.settings))
    (partial / DIRECTIONS.parent).mkdir()
    write_directions(partial / DIRECTIONS, job.directions, job.folder.fingerprint)
    if GEOMETRIES[job.settings.ablation.geometry].reads_inputs:  # they depend on more than weights and directions
        write_tensors(partial / OPERATORS, operator_tensors(job.operators), {"fingerprint": job.folder.fingerprint})
    beside = {
        name: {"file": path.as_posix(), "sha256": sha256(partial / path)}
        for name, path in (("directions", DIRECTIONS), ("operators", OPERATORS))
        if (partial / path).is_file()
    }
    manifest = _manifest(job, written, beside, verification, studied)
    measured = UNMEASURED.format(tensors=checked)
    if isinstance(job, ExportJob):
        measured = (CONVERTED if form.convert else AS_WRITTEN) + _quantization_note(
            form, studied, job.plan.quantization
        )
    write_text(partial / "README.md", card(manifest, read_base_card(job.checkpoint.folder), written, measured.strip()))
    manifest["files"] = inventory_of(partial, written.hashes["written"], stop)
    write_text(partial / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return Export(job.destination, verification, job.trial)


def earlier_export(destination: Path, folder: RunFolder, trial: int, settings: Settings) -> Export | None:
    """Return the destination's complete export of this trial in the settings' format; None without one."""
    try:
        manifest = json.loads((destination / MANIFEST).read_text(encoding="utf-8"))
        written = manifest["written"]
        made = (manifest["run"], manifest["fingerprint"], manifest["trial"], written["format"])
        if made != (folder.name, folder.fingerprint, trial, settings.export_format):
            return None
        options = FORMATS[settings.export_format].options(settings)
        if not written.get("exact") and any(written.get(name) != value for name, value in options.items()):
            return None
        if manifest.get("behavior", "") != settings.behavior:
            return None
        if not all((destination / name).is_file() for name in written["sha256"]):
            return None
        comparisons = comparisons_of(manifest)
        if not {*choose_scorers(settings).exported} <= {c.name for c in comparisons}:
            return None
        scores = Scores.from_dict({**manifest["scores"]["written"], "seconds": {}})
        verified = manifest["verification"]  # older ones have more keys
        verification = Verification(verified["divergence"], scores, verified["tensors_checked"], comparisons)
        return Export(destination, verification, trial)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _quantization_note(form: Format, studied: str, measured: str) -> str:
    """A sentence for the card, if the study was on a quantized model and the export is not."""
    if studied == "none" or not form.full_precision:
        return ""
    how = "in full precision" if measured == "none" else "quantized in the same way, since full precision did not fit"
    return (
        f"The study used the base model quantized to {QUANTIZATIONS[studied].words}; the edit was then applied to its "
        f"full-precision tensors. For the scores below both models were loaded {how}."
    )


def _manifest(
    job: EditJob, written: WriteResult, beside: dict[str, Any], verification: Verification, studied: str
) -> dict[str, Any]:
    template = read_template(job.settings)
    name, commit_of_base = job.checkpoint.on_hub or (job.settings.model, None)
    return {
        "made_with": "heretic",
        "made_at": now(),
        "run": job.folder.name,
        "fingerprint": job.folder.fingerprint,
        "trial": job.trial,
        "model": {"name": name, "revision": commit_of_base, "sha256": written.hashes["source"]},
        "written": {"format": job.format, "sha256": written.hashes["written"], **written.facts},
        "copied": {"sha256": written.hashes.get("copied", {})},
        "changed": {"sha256": written.hashes.get("changed", {})},
        "chat_template": {"sha256": hashlib.sha256(template.encode()).hexdigest()} if template else None,
        **beside,
        "prompts": {s.role: {"source": s.source, "count": len(s), "sha256": s.sha256} for s in job.prompts.all},
        "settings": job.settings.fingerprint_fields(),
        "dtype": job.plan.dtypes[0],
        "quantization": {"study": studied, "measured": job.plan.quantization},
        "computed_on": job.computed_on,
        "response_prefix": job.start.prefix,
        "template_variables": dict(job.start.variables),
        "ablation": job.ablation.as_dict(),
        "params": dict(job.params),
        "behavior": job.settings.behavior,
        "scores": _scores(job, verification) if isinstance(job, ExportJob) else None,
        "measures": [comparison.as_dict() for comparison in verification.comparisons],
        "verification": verification.as_dict(),
        "versions": versions(),
    }


def _scores(job: ExportJob, verification: Verification) -> dict[str, Any]:
    baseline, written = job.baseline, verification.scores
    assert written is not None
    return {
        "original": {
            "refusals": baseline.refusals,
            "evasive": baseline.evasive,
            "total": len(baseline.refused),
        },
        "study": scores_text(job.scores),
        "written": scores_text(written),
    }
