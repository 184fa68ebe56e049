"""One ablation of a model that fits neither GPU nor RAM, read block by block from disk, without scores."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.directions import Directions
from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.operator_factory import OperatorFactory
from heretic.errors import UserError
from heretic.export.destination import check_destination
from heretic.export.export import Export, write_export
from heretic.export.formats import FORMATS, require_format
from heretic.export.request import EditJob
from heretic.files import expand_user
from heretic.hardware.gpus import gpus_here
from heretic.hardware.host import devices, format_bytes
from heretic.interrupt import StopSignal
from heretic.model.batching import Batcher
from heretic.model.block_loading import check_readable_by_block, load_by_block
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import Checkpoint, open_model, require_name
from heretic.model.loading import LanguageModel
from heretic.model.template import read_template
from heretic.model.unloading import unloaded_after
from heretic.pipeline.ablate import check_strength, needs_strength
from heretic.pipeline.api import MANUAL_TRIAL, check_layer
from heretic.pipeline.prepare import raise_failure, read_inputs
from heretic.pipeline.run import device_lock, logging_to
from heretic.planning.block_plan import BlockPlan, plan_by_block, supported_by_block
from heretic.planning.memory_plan import LoadPlan
from heretic.planning.preflight import build_report
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets, load_all
from heretic.runs import fingerprint
from heretic.runs.environment import computed_on
from heretic.runs.folder import RunFolder
from heretic.session.encoding import encode, start_without_model
from heretic.session.find_directions import find_directions
from heretic.session.session import weight_reader
from heretic.settings import Settings
from heretic.settings.sources import Resolved
from heretic.settings.toml import toml_value

# Reads of the model: to find the writers (a mixture's are run more often), for each round of residuals with its check, for the
# statistics of weights, and to write and to hash.
READS_TO_FIND, READS_TO_FIND_MIXTURES, READS_OF_A_ROUND, READS_FOR_STATS, READS_TO_EXPORT = 2, 4, 2, 1, 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Inputs:
    """Everything that is known before the model is read."""

    settings: Settings
    checkpoint: Checkpoint
    prompts: PromptSets
    plan: BlockPlan
    folder: RunFolder


def ablate_by_block(
    resolved: Resolved,
    destination: Path,
    *,
    strength: float | None,
    layer: float | None = None,
    wait: bool = False,
    reporter: ProgressReporter,
    stop: StopSignal,
) -> Export:
    """Write one ablation with a given strength; its edited tensors are verified, and no score is measured.

    Peak memory is one block and what is outside the blocks. Directions stay in a folder of their own in `runs_dir`, so another
    strength does not compute them again.

    Args:
        resolved: The settings with their origins.
        destination: New folder for the model.
        strength: Of all writers; it is required, since a search would read the model thousands of times.
        layer: Layer whose direction is removed everywhere; None: each layer's own.
        wait: Wait for devices that another process holds.
        reporter: Receives progress and warnings.
        stop: Requests a stop.

    Raises:
        UserError: The model, the settings or the machine do not allow it.
        VerificationFailed: A written tensor is not the edit's.
        Interrupted: A stop.
    """
    if strength is None:
        raise needs_strength("--by-block")
    check_strength(strength)
    _check_settings(resolved.settings)
    with device_lock(resolved.settings, wait=wait, reporter=reporter, stop=stop):
        inputs = _prepare(resolved.settings, expand_user(destination), reporter)
        inputs.folder.create()
        with logging_to(inputs.folder):
            job = _plan_edit(inputs, expand_user(destination).resolve(), strength, layer, reporter, stop)
            return write_export(job, reporter, stop)


def _check_settings(settings: Settings) -> None:
    """Raise UserError for settings that need the whole model."""
    form = settings.export_format
    refused = {
        "quantization": settings.quantization != "none" and 'quantization = "none"',
        **{name: f"{name} = {toml_value(value)}" for name, value in supported_by_block(settings.ablation).items()},
        "export_format": FORMATS[form].read_back is None and 'export_format = "full"',  # nothing would verify it
    }
    for where, fix in refused.items():
        if fix:
            raise UserError(
                f"Block by block, heretic does not support this {where}.", code="not-by-block", where=where, fix=fix
            )


def _prepare(settings: Settings, destination: Path, reporter: ProgressReporter) -> _Inputs:
    """Check everything that can be checked without weights, and plan where the blocks run. Raises UserError."""
    require_name(settings.model)
    read_prompts = cache(lambda: load_all(settings.prompts))
    exporting = settings.model_copy(update={"save_to": str(destination)})
    found = read_inputs(exporting, read_prompts, judging=False)
    raise_failure(build_report(exporting, found, placed=False))
    assert found.checkpoint is not None
    check_readable_by_block(found.checkpoint)
    require_format(settings, found.checkpoint)
    plan = plan_by_block(settings, found.checkpoint, found.work, devices(gpus_here()))
    checkpoint, prompts = open_model(settings), read_prompts()  # this downloads the weights
    check_readable_by_block(checkpoint)
    for warning in prompts.warnings:
        reporter.warning(warning)
    facts = fingerprint.facts(settings, checkpoint, prompts, [plan.dtype], read_template(settings))
    name = fingerprint.short_hash({**facts, "by_block": True})  # without the prefix that a study detects in answers
    folder = RunFolder(Path(settings.runs_dir) / f"{checkpoint.short_name}-{name}", name)
    check_destination(destination, folder.name)
    return _Inputs(settings, checkpoint, prompts, plan, folder)


def _plan_edit(
    inputs: _Inputs,
    destination: Path,
    strength: float,
    layer: float | None,
    reporter: ProgressReporter,
    stop: StopSignal,
) -> EditJob:
    """Read the model as often as needed, and return the edit of its tensors."""
    settings, plan, folder = inputs.settings, inputs.plan, inputs.folder
    directions = folder.load_directions(reporter)
    _announce(inputs, known=directions is not None, reporter=reporter)
    # 1. Find the writers
    model = load_by_block(
        inputs.checkpoint,
        plan.dtype,
        torch.device(plan.device.name),
        trust_remote_code=settings.trust_remote_code,
        chat_template=read_template(settings),
        reporter=reporter,
        stop=stop,
    )
    with unloaded_after(model.model):
        check_layer(layer, model.structure.num_layers)
        # 2. Compute the directions
        chat = ChatFormat.of(model.tokenizer, settings, rows=model.rows)
        start = start_without_model(chat, inputs.prompts, settings, reporter)
        if directions is None:
            chat = chat.with_variables(start.variables).answering(start.prefix)
            directions = _directions(inputs, model, chat, reporter, stop)
            folder.save_directions(directions)
        # 3. Compute the edit
        ablation = Ablation.uniform(model.structure.components, strength, model.structure.num_layers, layer)
        operators = OperatorFactory.prepare(
            directions,
            model.structure.writers,
            settings.ablation.geometry,
            weight_reader(model),
            reporter,
            norm_aware=settings.ablation.norm_aware,
        ).operators(ablation)
        assert model.loader is not None
        log.info("read %s of blocks before the export", format_bytes(model.loader.bytes_read))
        return EditJob(
            format=settings.export_format,
            settings=settings,
            checkpoint=inputs.checkpoint,
            plan=LoadPlan([plan.dtype], {"device_map": {"": plan.device.key}}, plan.batch_size),
            operators=operators,
            prepared=FORMATS[settings.export_format].prepare(model, operators, settings, reporter),
            prompts=inputs.prompts,
            folder=folder,
            destination=destination,
            trial=MANUAL_TRIAL,
            params=ablation.as_dict(),
            ablation=ablation,
            directions=directions,
            computed_on=computed_on(model.device),
            start=start,
        )


def _directions(
    inputs: _Inputs, model: LanguageModel, chat: ChatFormat, reporter: ProgressReporter, stop: StopSignal
) -> Directions:
    encoded = encode(inputs.prompts, chat, model.context, inputs.settings)
    batcher = Batcher(
        inputs.plan.batch_size, model.device, pad=model.pad, equal_lengths=True, stop=stop, reporter=reporter
    )
    harmful, harmless = (encoded[role] for role in ("harmful_train", "harmless_train"))
    return find_directions(model, harmful, harmless, batcher, inputs.settings.directions)


def _announce(inputs: _Inputs, *, known: bool, reporter: ProgressReporter) -> None:
    """Say what this mode costs and what it leaves out."""
    plan, settings = inputs.plan, inputs.settings
    reads = (READS_TO_FIND_MIXTURES if plan.mixture else READS_TO_FIND) + READS_TO_EXPORT
    reads += 0 if known else READS_OF_A_ROUND * (1 + settings.directions.iterative_rounds)
    reads += READS_FOR_STATS * (GEOMETRIES[settings.ablation.geometry].needs == "weight_stats")
    reporter.info(
        f"Block by block on {plan.device.name}: heretic reads {format_bytes(inputs.checkpoint.nbytes)} from disk about {reads} "
        f"times, with {format_bytes(plan.weights)} of weights in memory."
    )
    reporter.info(
        "It measures no scores, since each token of an answer would be another read, and detects no response_prefix."
    )
