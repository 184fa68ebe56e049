"""The directions of a model: residuals captured, directions found in them and cleaned, as many rounds as the settings say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from heretic.ablation.ablation import Ablation, OperatorFactory
from heretic.ablation.apply import apply_operators
from heretic.ablation.cleanup import project_out_mean
from heretic.ablation.directions import Directions, normalized
from heretic.ablation.methods import METHODS
from heretic.ablation.operator import Operator
from heretic.ablation.residual_geometry import GeometryRecorder, Sample
from heretic.errors import UserError
from heretic.hardware.host import format_bytes, memory
from heretic.model.batching import Batcher
from heretic.model.capture import bytes_of_each, mean_residuals
from heretic.model.loading import LanguageModel
from heretic.planning.memory_model import SHARE_FOR_RESIDUALS
from heretic.settings import DirectionSettings as Wanted


def find_directions(
    model: LanguageModel,
    harmful: Sequence[list[int]],
    harmless: Sequence[list[int]],
    batcher: Batcher,
    wanted: Wanted,
    survey: GeometryRecorder | None = None,
) -> Directions:
    """Directions from prompts of both kinds (token ids), one pass over them a round. Raises UserError.

    Every round after the first runs the model with all directions found so far removed: at strength 1, by the `plain` geometry,
    from every writer, each layer's own. A round lets go of its residuals before the next captures its own. `survey` takes its
    sample of the first one.
    """
    method = METHODS[wanted.method]
    keep_each = wanted.keeps_each
    if keep_each:
        _check_room(model, len(harmful) + len(harmless), wanted)
    found = None
    for _ in range(1 + wanted.iterative_rounds):
        seen = survey if found is None else None
        samples = [
            Sample.room(len(asked) if seen else 0, model.structure.num_layers, model.structure.width)
            for asked in (harmful, harmless)
        ]
        with ExitStack() as stack:
            if found is not None:
                stack.enter_context(apply_operators(model.structure.writers, _removing(model, found)))
            bad, good = (
                mean_residuals(
                    model, f"Residuals of {name}", asked, batcher, wanted.winsorize, keep=keep, keep_each=keep_each
                )
                for name, asked, keep in (
                    ("harmful_train", harmful, samples[0].keep),
                    ("harmless_train", harmless, samples[1].keep),
                )
            )
        if not (bad.mean.isfinite().all() and good.mean.isfinite().all()):
            raise UserError(
                "Some residuals are infinite or NaN.",
                code="residuals-not-finite",
                where="dtypes",
                fix='dtypes = ["bfloat16", "float32"]',
            )
        if seen is not None:
            seen.record((bad, good), (samples[0], samples[1]))
        vectors = method.find(bad, good, wanted.count, model.device)
        found = normalized(project_out_mean(vectors, good) if wanted.project_harmless else vectors, found)
    assert found is not None
    return found


def _removing(model: LanguageModel, directions: Directions) -> dict[str, Operator]:
    writers = model.structure.writers
    strengths = dict.fromkeys(model.structure.components, (1.0,) * directions.num_layers)
    return OperatorFactory.prepare(directions, writers, "plain").operators(Ablation(strengths))


def _check_room(model: LanguageModel, prompts: int, wanted: Wanted) -> None:
    needed, free = bytes_of_each(model, prompts), memory()[1]
    if needed > SHARE_FOR_RESIDUALS * free:
        raise UserError(
            f"The residuals of all {prompts} prompts need {format_bytes(needed)} of RAM. {format_bytes(free)} are free, and "
            "heretic uses at most half of that.",
            code="insufficient-ram",
            where="directions.method",
            fix='use fewer prompts in prompts.harmful_train and harmless_train, or directions.method = "mean_difference"',
        )
