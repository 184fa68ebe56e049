"""Residual geometry of a model or a run, and what its directions do."""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.ablation.directions import Directions
from heretic.ablation.residual_geometry import GeometryRecorder, ResidualGeometry
from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.model.unloading import unloaded_after
from heretic.pipeline.gradient_search import MIN_REFUSALS, find_refusals
from heretic.pipeline.prepare import prepare_run
from heretic.pipeline.run import device_lock
from heretic.runs.folder import RunFolder
from heretic.scoring.direction_effects import PROMPTS, DirectionEffects, direction_effects
from heretic.scoring.teacher_forcing import TeacherForcedTexts
from heretic.search.summary import StudyReporter
from heretic.session.model_context import ModelContext, load_model_context
from heretic.session.session import find_model_directions
from heretic.settings import Settings


def residual_geometry(
    settings: Settings,
    folder: RunFolder | None,
    *,
    effects: bool = False,
    wait: bool,
    reporter: StudyReporter,
    stop: StopSignal,
) -> tuple[ResidualGeometry, DirectionEffects | None]:
    """Return the residual geometry on the training prompts: stored in the run's folder, else measured and stored there.

    With `effects` also those of the directions, which are otherwise returned only if they are stored. Raises UserError.
    """
    settings = settings.model_copy(update={"save_to": ""})  # nothing is exported, so the destination is not checked
    stored, stored_effects = (folder.load_geometry(), folder.load_effects()) if folder else (None, None)
    if stored is not None and (stored_effects is not None or not effects):
        return stored, stored_effects
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        inputs = prepare_run(settings, force=False, reporter=reporter)
        model_context = load_model_context(settings, inputs.checkpoint, inputs.prompts, inputs.plan, reporter, stop)
        with unloaded_after(model_context.language_model.model):
            recorder = GeometryRecorder()
            directions = find_model_directions(model_context, recorder)
            geometry = recorder.geometry(directions)
            if folder is not None:
                inputs.folder.save_geometry(geometry)
            if effects:
                stored_effects = measure_effects(model_context, directions, geometry.norms[:, 2])
        if folder is not None and stored_effects is not None:
            inputs.folder.save_effects(stored_effects)
        return geometry, stored_effects


@torch.no_grad()
def measure_effects(model_context: ModelContext, directions: Directions, lengths: Tensor) -> DirectionEffects:
    """Measure what the layers' directions do to training prompts of both kinds; `lengths` [layers] is added of each.

    Raises UserError if the model refuses too few prompts.
    """
    encoded, settings = model_context.encoded, model_context.settings.search.gradient
    requests = encoded["harmful_train"][: 2 * PROMPTS]
    refusals = find_refusals(model_context, requests)
    answers = zip(requests, refusals.tokens, refusals.refused, strict=True)
    known = [(request, list(t[: settings.refusal_tokens])) for request, t, refused in answers if refused and t][
        :PROMPTS
    ]
    if len(known) < MIN_REFUSALS:
        raise UserError(
            f"The model refuses {len(known)} of {len(requests)} prompts of harmful_train, too few to measure directions.",
            code="too-few-refusals",
            where="prompts.harmful_train",
            fix="use requests that the model refuses, or check refusal_markers",
        )
    refused = TeacherForcedTexts.of(*zip(*known, strict=True))
    harmless = encoded["harmless_train"][:PROMPTS]
    return direction_effects(
        model_context.language_model,
        model_context.batcher,
        directions,
        lengths,
        refused,
        harmless,
        norm_aware=model_context.settings.ablation.norm_aware,
    )
