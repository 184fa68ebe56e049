"""What a written model is compared with, where the study was made on a quantized one: the original in full precision, if it fits.

The scores in the card are those of the model that is written, so both sides of them, the original and the ablated model, are
measured in its number format. Where the model has no room in full precision, what was written is loaded as the study loaded the
original, and the manifest says so.
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
from heretic.session.session import load_model_context, measure_baseline


def full_precision_plan(job: ExportJob) -> LoadPlan | None:
    """How to load the model unquantized on the devices that are here; None if it does not fit. RAM may help out."""
    here = devices(gpus_here())
    work = Workload.of(job.settings, job.prompts.longest).counted(job.settings, job.checkpoint, job.prompts)
    for device_map in (job.settings.device_map, "auto"):
        update = {"quantization": "none", "device_map": device_map, "apply": "operators", "batch_size": 0}
        settings = job.settings.model_copy(update=update)
        try:
            plan = plan_for(settings, job.checkpoint, replace(work, gradient_search=None), here)
        except UserError:
            continue
        if plan.fits:
            return LoadPlan.of(settings, plan)
    return None


def to_full_precision(job: ExportJob, reporter: ProgressReporter, stop: StopSignal) -> ExportJob:
    """The job with the original in full precision to be compared with, measured anew; as it is where that does not fit."""
    plan = full_precision_plan(job)
    if plan is None:
        reporter.warning(
            "The model does not fit here in full precision: what is written is loaded quantized to be compared and measured."
        )
        return job
    model_context = load_model_context(
        job.settings, job.checkpoint, job.prompts, plan, reporter, stop, job.baseline.start, job.judge
    )
    model = model_context.language_model
    with unloaded_after(model.model):
        baseline = measure_baseline(model_context)
        taught = replace(model_context.evaluator, reference_tokens=baseline.answered).harmless_texts
        with apply_operators(model.structure.writers, job.operators):
            attached = all_log_probs(model, taught, model_context.batcher, "Ablated model's answers")
    plan = replace(plan, dtypes=[model.dtype], batch_size=model_context.batcher.size)
    return replace(
        job,
        plan=plan,
        baseline=baseline,
        attached=attached,
        ablated_by=float(divergences(baseline.log_probs, attached).mean()),
    )
