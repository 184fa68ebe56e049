"""What a written model is compared with, where the study was made on a quantised one: the original in full precision, if it fits.

The scores in the card are those of the model that is written, so both sides of them, the original and the ablated model, are
measured in its number format. Where the model has no room in full precision, what was written is loaded as the study loaded the
original, and the manifest says so.
"""

from __future__ import annotations

from dataclasses import replace

from heretic.ablation.apply import attach
from heretic.errors import UserError
from heretic.export.request import ExportJob
from heretic.hardware.gpus import gpus_here
from heretic.hardware.host import devices
from heretic.interrupt import Stop
from heretic.model.unloading import unloaded_after
from heretic.planning.memory_plan import LoadPlan, plan_for
from heretic.planning.workload import Workload
from heretic.progress import Watcher
from heretic.scoring.divergence import divergences
from heretic.scoring.teacher_forcing import all_log_probs
from heretic.session.session import measure_baseline, open_bench


def full_precision_plan(job: ExportJob) -> LoadPlan | None:
    """How to load the model unquantised on the devices that are here; None if it does not fit. RAM may help out."""
    here = devices(gpus_here())
    work = Workload.of(job.settings, job.prompts.longest).counted(job.settings, job.checkpoint, job.prompts)
    for device_map in (job.settings.device_map, "auto"):
        update = {"quantization": "none", "device_map": device_map, "apply": "operators", "batch_size": 0}
        settings = job.settings.model_copy(update=update)
        try:
            plan = plan_for(settings, job.checkpoint, replace(work, walk=None), here)
        except UserError:
            continue
        if plan.fits:
            return LoadPlan.of(settings, plan)
    return None


def in_full_precision(job: ExportJob, watcher: Watcher, stop: Stop) -> ExportJob:
    """The job with the original in full precision to be compared with, measured anew; as it is where that does not fit."""
    plan = full_precision_plan(job)
    if plan is None:
        watcher.warn(
            "The model does not fit here in full precision: what is written is loaded quantised to be compared and measured."
        )
        return job
    bench = open_bench(job.settings, job.checkpoint, job.prompts, plan, watcher, stop, job.baseline.start, job.judge)
    model = bench.language_model
    with unloaded_after(model.model):
        baseline = measure_baseline(bench)
        taught = replace(bench.ladder, answered=baseline.answered).taught
        with attach(model.anatomy.writers, job.operators):
            attached = all_log_probs(model, taught, bench.batcher, "Ablated model's answers")
    plan = replace(plan, dtypes=[model.dtype], batch_size=bench.batcher.size)
    return replace(
        job,
        plan=plan,
        baseline=baseline,
        attached=attached,
        ablated_by=float(divergences(baseline.log_probs, attached).mean()),
    )
