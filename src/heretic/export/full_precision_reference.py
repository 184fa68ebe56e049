"""The full-precision reference for exports of studies on a quantized model.

The card's scores are those of the written model, so original and ablated model are measured in its dtype. If full precision does
not fit, the written model is loaded quantized as in the study, and the manifest records it.
"""

from __future__ import annotations

from dataclasses import replace

from heretic.ablation.apply import apply_operators
from heretic.errors import UserError
from heretic.export.request import ExportJob
from heretic.hardware.gpus import gpus_here
from heretic.hardware.host import devices
from heretic.interrupt import StopSignal
from heretic.model.unloading import unloaded_after
from heretic.planning.memory_plan import LoadPlan, plan_for
from heretic.planning.workload import Workload
from heretic.progress import ProgressReporter
from heretic.scoring.divergence import divergences
from heretic.scoring.teacher_forcing import all_log_probs
from heretic.session.model_context import load_model_context
from heretic.session.session import measure_baseline


def full_precision_plan(job: ExportJob) -> LoadPlan | None:
    """Return how to load the model unquantized on the available devices and RAM; None if it does not fit."""
    available = devices(gpus_here())
    workload = Workload.of(job.settings, job.prompts.longest).counted(job.settings, job.checkpoint, job.prompts)
    for device_map in (job.settings.device_map, "auto"):
        update = {"quantization": "none", "device_map": device_map, "apply": "operators", "batch_size": 0}
        settings = job.settings.model_copy(update=update)
        try:
            plan = plan_for(settings, job.checkpoint, replace(workload, gradient_search=None), available)
        except UserError:
            continue
        if plan.fits:
            return LoadPlan.of(settings, plan)
    return None


def to_full_precision(job: ExportJob, reporter: ProgressReporter, stop: StopSignal) -> ExportJob:
    """Return the job with a baseline recomputed in full precision; unchanged if that does not fit."""
    plan = full_precision_plan(job)
    if plan is None:
        reporter.warning(
            "The model does not fit in full precision, so the export is verified and measured quantized. More memory fixes this."
        )
        return job
    model_context = load_model_context(
        job.settings, job.checkpoint, job.prompts, plan, reporter, stop, job.baseline.start, job.judge
    )
    model = model_context.language_model
    with unloaded_after(model.model):
        baseline = measure_baseline(model_context)
        originals = model_context.measurer.originals(job.originals)
        taught = replace(model_context.evaluator, reference_tokens=baseline.answered).harmless_texts
        with apply_operators(model.structure.writers, job.operators):
            attached = all_log_probs(model, taught, model_context.batcher, "Ablated model's answers")
    plan = replace(plan, dtypes=[model.dtype], batch_size=model_context.batcher.size)
    return replace(
        job,
        plan=plan,
        baseline=baseline,
        originals=originals,
        attached=attached,
        ablated_by=float(divergences(baseline.log_probs, attached).mean()),
    )
