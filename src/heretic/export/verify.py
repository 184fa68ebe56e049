"""Verify a written model: reload it and compare its answers with the ablated model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from heretic.errors import UserError, VerificationFailed
from heretic.export.formats import FORMATS
from heretic.export.request import ExportJob, WriteResult
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint
from heretic.model.unloading import unloaded_after
from heretic.progress import ProgressReporter
from heretic.scoring.comparison import Comparison
from heretic.scoring.divergence import divergences
from heretic.scoring.scores import Scores
from heretic.scoring.teacher_forcing import all_log_probs
from heretic.session.model_context import ModelContext, load_model_context

# A wrong or missing edit moves the answers by about what the ablation itself moves them, so the mean KL between the attached
# and the written model may be this share of the ablation's KL, besides what rounding the edited weights does.
TOLERATED_SHARE = 0.1
TOLERATED_SHARE_OF_A_PART = 0.5  # where the format cannot hold all of the edit, and says so
ROUNDING = {"float32": 1e-4}  # weights are stored in the checkpoint's format, mostly bfloat16
ROUNDING_IN_HALF_PRECISION = 2e-3  # two passes in bfloat16 differ besides
# Quantizing edited weights rounds them otherwise than editing quantized ones does: measured on Qwen2.5-Coder-0.5B-Instruct, a mean
# KL of 0.003 in 8 bits and 0.006 in 4.
REQUANTIZED_TOLERANCE = {"bnb_8bit": 0.02, "bnb_4bit": 0.05}


@dataclass(frozen=True)
class Verification:
    """Differences between the written and the ablated model, and the written model's scores; None: it was not loaded."""

    divergence: float | None = None  # mean KL, nats
    scores: Scores | None = None
    tensors_checked: int = 0  # edited tensors that were checked one by one
    comparisons: tuple[Comparison, ...] = ()  # of the scorers that an export tells of

    def as_dict(self) -> dict[str, Any]:
        """Return the differences, for --json and the manifest."""
        return {k: v for k, v in vars(self).items() if k not in ("scores", "comparisons")}


def verify(
    job: ExportJob, checkpoint: Checkpoint, written: WriteResult, reporter: ProgressReporter, stop: StopSignal
) -> Verification:
    """Load the written `checkpoint`, compare it with the ablated model, and measure its scores.

    Raises VerificationFailed, or UserError if an inexact format is too far off.
    """
    trusted = [checkpoint.model] if job.checkpoint.model in job.settings.trust_remote_code else []
    trusting = job.settings.model_copy(update={"trust_remote_code": trusted})
    model_context = load_model_context(
        trusting, checkpoint, job.prompts, job.plan, reporter, stop, job.baseline.start, job.judge
    )
    with unloaded_after(model_context.language_model.model):
        return _compare(job, model_context, checkpoint, written)


def _compare(job: ExportJob, model_context: ModelContext, checkpoint: Checkpoint, written: WriteResult) -> Verification:
    evaluator = replace(model_context.evaluator, reference_tokens=job.baseline.answered)
    log_probs = all_log_probs(
        model_context.language_model, evaluator.harmless_texts, model_context.batcher, "Verifying the written model"
    )
    divergence = float(divergences(job.attached, log_probs).mean())
    rounding = max(ROUNDING.get(job.plan.dtypes[0], ROUNDING_IN_HALF_PRECISION), written.rounding)
    if FORMATS[job.format].full_precision:
        rounding += REQUANTIZED_TOLERANCE.get(job.plan.quantization, 0.0)
    share = TOLERATED_SHARE if written.exact else TOLERATED_SHARE_OF_A_PART
    tolerated = share * job.ablated_by + rounding
    if divergence <= tolerated:
        scores = evaluator.score(job.baseline.log_probs, log_probs)
        _, comparisons = model_context.measurer.of_model(job.originals, job.originals)
        return Verification(divergence, scores, comparisons=comparisons + job.comparisons)
    what = f"The written model differs from the measured one: mean KL {divergence:.1e}, tolerated {tolerated:.1e}."
    if not written.exact:
        raise UserError(
            what,
            code="adapter-not-exact",
            where=f'export_format = "{job.format}"',
            fix="raise lora_rank, or choose another format",
        )
    raise VerificationFailed(
        what,
        where=str(job.destination),
        fix="report it with run.log: heretic or the disk has a fault; the study is kept",
    )
