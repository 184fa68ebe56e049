"""The format `full`: an ordinary model folder with the checkpoint's own shards and dtypes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from heretic.ablation.operator import Operator
from heretic.export.request import Format, WriteRequest, WriteResult
from heretic.export.save import TensorEdit, plan_edits, write_dequantized, write_weights
from heretic.export.spot_check import Columns, WrittenTensors, as_columns, rounding_of
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint, open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.model.template import read_template
from heretic.model.unloading import unloaded_after
from heretic.progress import ProgressReporter
from heretic.settings import Settings

ROUNDED_AS_A_WHOLE = 2e-3  # nats: every tensor of a dequantized model is rounded to bfloat16


def prepare(
    model: LanguageModel, operators: Mapping[str, Operator], settings: Settings, reporter: ProgressReporter
) -> dict[str, TensorEdit]:
    """Plan the edits by checkpoint tensor; empty for a dequantized model. Raises UserError for packed tensors."""
    if model.checkpoint.is_dequantized:
        return {}
    return plan_edits(model.checkpoint, model.structure.writers, operators, model.model)


def write(order: WriteRequest, folder: Path, reporter: ProgressReporter, stop: StopSignal) -> WriteResult:
    """Write the checkpoint's tensors with the edits; for GGUF or quantized checkpoints those of the dequantized model."""
    template = read_template(order.settings)
    if not order.checkpoint.is_dequantized:
        return WriteResult(write_weights(order.checkpoint, order.prepared, folder, reporter, stop, template))
    # On the CPU in bfloat16, the dtype to write, whatever devices the study used.
    model = load(
        order.checkpoint,
        ["bfloat16"],
        {"device_map": {"": "cpu"}},
        trust_remote_code=[order.checkpoint.model] if order.checkpoint.own_code else [],
        chat_template=template or None,
        reporter=reporter,
    )
    with unloaded_after(model.model):
        hashes = write_dequantized(
            order.checkpoint, model.structure.writers, order.operators, model, folder, reporter, stop, template
        )
    about = f"The base model is stored as {order.checkpoint.is_dequantized}; this model holds its edited weights in bfloat16."
    return WriteResult(hashes, about=about, rounding=ROUNDED_AS_A_WHOLE)


def open_written(order: WriteRequest, folder: Path) -> Checkpoint:
    """Open the written folder; code copied from a trusted model is trusted."""
    trusted = order.checkpoint.model in order.settings.trust_remote_code
    return open_checkpoint(str(folder), trust_remote_code=[str(folder)] if trusted else [])


def read_back(order: WriteRequest, folder: Path) -> WrittenTensors | None:
    """Return access to the written tensors; None for a dequantized model, whose tensors have other names."""
    if order.checkpoint.is_dequantized:
        return None
    written = open_written(order, folder)
    slice_of = functools.lru_cache(maxsize=1)(written.slice_of)  # several slices of one tensor follow each other

    def columns(name: str, where: Columns | None, expected: Tensor) -> tuple[Tensor, Tensor]:
        values = as_columns(written.read(name)) if where is None else where.of(slice_of(name))
        return values, rounding_of(expected, values.dtype)

    return WrittenTensors(order.prepared, columns, None if order.checkpoint.pickled else written.slice_of)


def size(checkpoint: Checkpoint, _: Settings) -> float:
    """Return the bytes of the folder; a dequantized model is written in 16 bits."""
    return 2 * checkpoint.parameters if checkpoint.is_dequantized else checkpoint.nbytes


FORMAT = Format("an ordinary model folder", prepare, write, open_written, size, read_back=read_back)
