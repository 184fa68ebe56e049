"""The edit of a manifest, for the loaded base model."""

from __future__ import annotations

import torch

from heretic.ablation.directions import Directions
from heretic.ablation.operator import Operator
from heretic.ablation.operator_factory import OperatorFactory
from heretic.errors import UserError
from heretic.export.manifest import Manifest
from heretic.model.input_capture import input_width
from heretic.model.loading import LanguageModel
from heretic.model.writer import output_width
from heretic.progress import ProgressReporter
from heretic.session.session import weight_reader


def stored_edit(
    manifest: Manifest,
    model: LanguageModel,
    directions: Directions | None,
    operators: dict[str, Operator] | None,
    reporter: ProgressReporter,
) -> dict[str, Operator]:
    """Return the operators, rebuilt from strengths and directions if they are not stored.

    Raises UserError if they do not match the model.
    """
    edit = manifest.ablation
    _check_fit(manifest, model, directions, operators or {})
    if operators is not None:
        return operators
    if directions is None:
        directions = Directions(torch.zeros(1, model.structure.width))  # unused: the edit has its own vector
    ablation = manifest.settings.ablation
    factory = OperatorFactory.prepare(
        directions,
        model.structure.writers,
        ablation.geometry,
        weight_reader(model),
        reporter,
        norm_aware=ablation.norm_aware,
    )
    return factory.operators(edit.ablation)


def _check_fit(
    manifest: Manifest, model: LanguageModel, directions: Directions | None, operators: dict[str, Operator]
) -> None:
    """Raise UserError if the edit has unknown components, or sizes that differ from the model's or the settings'."""
    layers, width, edit = model.structure.num_layers, model.structure.width, manifest.ablation
    each = manifest.settings.directions.per_layer  # several directions of a layer are concatenated
    sizes = [(f"strengths.{component}", len(profile), layers) for component, profile in edit.strengths.items()]
    sizes += [("mixture", len(edit.mixture), layers)] if edit.mixture is not None else []
    sizes += [("vector", len(edit.vector), each * width)] if edit.vector is not None else []
    if directions is not None:
        sizes += [("directions", directions.num_layers, layers), ("each direction", directions.vectors.shape[1], width)]
        sizes += [("each layer", directions.count * width, each * width)]
    writers = {writer.name: writer for writer in model.structure.writers}
    outputs = {name: output_width(writer.module) or width for name, writer in writers.items()}
    sizes += [(f"{name}.u", own.u.shape[-1], outputs.get(name, width)) for name, own in operators.items()]
    sizes += [
        (f"{name}.a", own.a.shape[-1], 0 if writers[name].mixture else input_width(writers[name]))
        for name, own in operators.items()
        if own.a is not None and name in writers
    ]
    problems = [f"there is no writer {name[:60]!r}" for name in operators if name not in writers]
    problems += [
        f"there is no component {name[:60]!r}; it has {', '.join(model.structure.components)}"
        for name in edit.strengths
        if name not in model.structure.components
    ]
    problems += [
        f"{what[:60]} has {size} numbers instead of {expected}" for what, size, expected in sizes if size != expected
    ]
    if problems:
        raise UserError(
            f"The manifest does not match the model: {problems[0]}.",
            code="manifest-mismatch",
            where=str(model.checkpoint.folder),
            fix="use the files that heretic export wrote",
        )
