"""From a chosen trial to a proven model folder: planned while the model is loaded, written after it has left memory."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from heretic.ablation.ablation import Ablation
from heretic.ablation.operator import Operator
from heretic.export.card import card
from heretic.export.manifest import now, scores_text, versions
from heretic.export.save import (
    MANIFEST,
    TensorEdit,
    disk_error,
    partial_folder,
    plan_edits,
    settle,
    write_dequantised,
    write_weights,
)
from heretic.export.verify import Verification, verify
from heretic.files import write_text
from heretic.model.batching import free_memory
from heretic.model.checkpoint import Checkpoint
from heretic.model.loading import load
from heretic.progress import Watcher
from heretic.prompts import PromptSets
from heretic.run_folder import Baseline, RunFolder
from heretic.scoring.ladder import Scores
from heretic.scoring.verdict import Judge
from heretic.search.front import Result
from heretic.search.space import Space
from heretic.session import LoadPlan, Session, read_template
from heretic.settings import Settings
from heretic.stop import Stop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportJob:
    """Everything that writing and proving the model needs, none of it the model."""

    settings: Settings
    checkpoint: Checkpoint
    prompts: PromptSets
    plan: LoadPlan
    folder: RunFolder
    destination: Path
    result: Result
    ablation: Ablation
    operators: Mapping[str, Operator]
    edits: Mapping[str, TensorEdit]
    baseline: Baseline
    attached: Tensor
    judge: Judge


@dataclass(frozen=True)
class Export:
    """A written and proven model."""

    destination: Path
    verification: Verification

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        proof = self.verification
        return {
            "written_to": str(self.destination),
            "scores": scores_text(proof.scores),
            "verification": {k: v for k, v in asdict(proof).items() if k != "scores"},
        }


def plan_export(
    session: Session, plan: LoadPlan, space: Space, result: Result, folder: RunFolder, destination: Path
) -> ExportJob:
    """Decide every edit, and keep the attached model's answers to prove the written one by. Raises UserError."""
    bench = session.bench
    model = bench.language_model
    ablation = space.from_params(result.params)
    operators = session.workbench.operators(ablation)
    return ExportJob(
        settings=bench.settings,
        checkpoint=model.checkpoint,
        prompts=bench.prompts,
        plan=LoadPlan([model.dtype], plan.arguments, bench.batcher.size),
        folder=folder,
        destination=destination.expanduser().resolve(),
        result=result,
        ablation=ablation,
        operators=operators,
        edits=plan_edits(model.checkpoint, model.anatomy.writers, operators, model.model),
        baseline=session.baseline,
        attached=session.log_probs(ablation),
        judge=bench.ladder.judge,
    )


def write_export(job: ExportJob, watcher: Watcher, stop: Stop) -> Export:
    """Write beside the destination, prove, describe, and rename into place. Raises UserError and VerificationFailed."""
    free_memory()
    partial = partial_folder(job.destination)
    try:
        export = _write(job, partial, watcher, stop)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # gigabytes that nobody would find
        if isinstance(error, (OSError, SafetensorError)):
            raise disk_error(error, partial) from None
        raise
    log.info("exported trial %s to %s", job.result.number, job.destination)
    return export


def _write(job: ExportJob, partial: Path, watcher: Watcher, stop: Stop) -> Export:
    from_gguf = job.checkpoint.gguf_file is not None
    hashes = (
        _dequantised(job, partial) if from_gguf else write_weights(job.checkpoint, job.edits, partial, watcher, stop)
    )
    free_memory()
    proof = verify(
        str(partial),
        job.settings,
        job.prompts,
        job.plan,
        job.baseline,
        job.judge,
        job.attached,
        job.result.scores.divergence.mean,
        from_gguf,
        watcher,
        stop,
    )
    source_card = job.checkpoint.folder / "README.md"
    write_text(partial / MANIFEST, json.dumps(_manifest(job, hashes, proof), indent=2, ensure_ascii=False) + "\n")
    text = card(
        base_model=job.settings.model,
        source_card=source_card.read_text(encoding="utf-8", errors="replace") if source_card.is_file() else "",
        ablation=job.ablation,
        geometry=job.settings.ablation.geometry,
        before=job.baseline,
        scores=proof.scores,
        run=job.folder.name,
        trial=job.result.number,
    )
    write_text(partial / "README.md", text)
    settle(partial, job.destination)
    return Export(job.destination, proof)


def earlier_export(destination: Path, folder: RunFolder, trial: int) -> Export | None:
    """The export that the destination holds already, if it is of this trial of this run."""
    try:
        manifest = json.loads((destination / MANIFEST).read_text(encoding="utf-8"))
        made = (manifest["run"], manifest["fingerprint"], manifest["trial"])
        if made != (folder.name, folder.stamp, trial):
            return None
        scores = Scores.from_dict({**manifest["scores"]["written"], "seconds": {}})
        return Export(destination, Verification(**manifest["verification"], scores=scores))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dequantised(job: ExportJob, partial: Path) -> dict[str, dict[str, str]]:
    model = load(job.checkpoint, job.plan.dtypes, job.plan.arguments, chat_template=read_template(job.settings))
    return write_dequantised(job.checkpoint, model.anatomy.writers, job.operators, model, partial)


def _manifest(job: ExportJob, hashes: dict[str, dict[str, str]], proof: Verification) -> dict[str, Any]:
    return {
        "made_with": "heretic",
        "made_at": now(),
        "run": job.folder.name,
        "fingerprint": job.folder.stamp,
        "trial": job.result.number,
        "model": {"name": job.settings.model, "revision": job.checkpoint.commit, "sha256": hashes["source"]},
        "written": {"sha256": hashes["written"]},
        "prompts": {s.role: {"source": s.source, "count": len(s), "sha256": s.sha256} for s in job.prompts.all},
        "settings": job.settings.results_part(),
        "dtype": job.plan.dtypes[0],
        "response_prefix": job.baseline.response_prefix,
        "ablation": job.ablation.as_dict(),
        "params": job.result.params,
        "scores": {
            "original": {
                "refusals": job.baseline.refusals,
                "evasive": job.baseline.evasive,
                "total": len(job.baseline.declined),
                "conduct": job.baseline.conduct.as_dict() if job.baseline.conduct else None,
            },
            "study": scores_text(job.result.scores),
            "written": scores_text(proof.scores),
        },
        "verification": {k: v for k, v in asdict(proof).items() if k != "scores"},
        "versions": versions(),
    }
