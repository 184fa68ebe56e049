"""Compute a model's refusal directions from captured residuals, in one or more rounds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.cleanup import project_out_mean
from heretic.ablation.directions import Directions, normalized
from heretic.ablation.methods import METHODS
from heretic.ablation.operator import Operator
from heretic.ablation.operator_factory import OperatorFactory
from heretic.ablation.residual_geometry import GeometryRecorder, Sample
from heretic.errors import UserError
from heretic.hardware.devices import for_float64
from heretic.hardware.host import format_bytes, memory
from heretic.model.batching import Batcher
from heretic.model.block_capture import mean_residuals_by_block
from heretic.model.capture import ResidualMeans, bytes_of_each, mean_residuals
from heretic.model.loading import LanguageModel
from heretic.planning.memory_model import SHARE_FOR_RESIDUALS
from heretic.settings import DirectionSettings as Wanted


def find_directions(
    model: LanguageModel,
    harmful: Sequence[list[int]],
    harmless: Sequence[list[int]],
    batcher: Batcher,
    settings: Wanted,
    recorder: GeometryRecorder | None = None,
) -> Directions:
    """Compute directions from harmful and harmless prompts (token ids), one pass over them per round.

    Every later round runs the model with each layer's previous directions removed from every writer (`plain` geometry,
    strength 1).

    Args:
        recorder: receives the means and a sample of the residuals of the first round; not of a model that is read block by block.

    Raises:
        UserError: if memory is short, residuals are not finite, or no direction exists.
    """
    method = METHODS[settings.method]
    if settings.keeps_each:
        _check_memory(model, len(harmful) + len(harmless), settings)
    directions = None
    for _ in range(1 + settings.iterative_rounds):
        round_recorder = recorder if directions is None else None
        samples = [
            Sample.allocate(len(asked) if round_recorder else 0, model.structure.num_layers, model.structure.width)
            for asked in (harmful, harmless)
        ]
        with ExitStack() as stack:
            if directions is not None:
                stack.enter_context(apply_operators(model.structure.writers, _removal_operators(model, directions)))
            harmful_stats, harmless_stats = _mean_residuals(model, (harmful, harmless), samples, batcher, settings)
        if not (harmful_stats.mean.isfinite().all() and harmless_stats.mean.isfinite().all()):
            raise UserError(
                "Some residuals are infinite or NaN.",
                code="residuals-not-finite",
                where="dtypes",
                fix='dtypes = ["bfloat16", "float32"]',
            )
        if round_recorder is not None:
            round_recorder.record((harmful_stats, harmless_stats), (samples[0], samples[1]))
        vectors = method.find(harmful_stats, harmless_stats, settings.count, for_float64(model.device))
        if settings.project_harmless:
            vectors = project_out_mean(vectors, harmless_stats)
        directions = normalized(vectors, directions)
    assert directions is not None
    return directions


def _mean_residuals(
    model: LanguageModel,
    sets: tuple[Sequence[list[int]], Sequence[list[int]]],
    samples: Sequence[Sample],
    batcher: Batcher,
    settings: Wanted,
) -> list[ResidualMeans]:
    """Compute the means of the harmful and the harmless prompts, and record their samples unless the model is read by block."""
    clip, each = settings.winsorize, settings.keeps_each
    if model.loader is not None:
        return mean_residuals_by_block(model, sets, batcher, clip, keep_each=each)
    return [
        mean_residuals(model, f"Residuals of {name}", asked, batcher, clip, keep=sample.record, keep_each=each)
        for name, asked, sample in zip(("harmful_train", "harmless_train"), sets, samples, strict=True)
    ]


def _removal_operators(model: LanguageModel, directions: Directions) -> dict[str, Operator]:
    writers = model.structure.writers
    strengths = dict.fromkeys(model.structure.writing_components, (1.0,) * directions.num_layers)
    return OperatorFactory.prepare(directions, writers, "plain").operators(Ablation(strengths))


def _check_memory(model: LanguageModel, prompts: int, settings: Wanted) -> None:
    needed, free = bytes_of_each(model, prompts), memory()[1]
    if needed > SHARE_FOR_RESIDUALS * free:
        raise UserError(
            f"The residuals of all {prompts} prompts need {format_bytes(needed)} of RAM. {format_bytes(free)} are free, and "
            "heretic uses at most half of that.",
            code="insufficient-ram",
            where="directions.method",
            fix='use fewer prompts in prompts.harmful_train and harmless_train, or directions.method = "mean_difference"',
        )
