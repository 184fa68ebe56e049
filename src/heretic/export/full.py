"""The format `full`: an ordinary model folder, in the checkpoint's own shards and number format."""

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

ROUNDED_AS_A_WHOLE = 2e-3  # nats: every tensor of an opened model is rounded to bfloat16, not the edited ones only


def prepare(
    model: LanguageModel, operators: Mapping[str, Operator], settings: Settings, reporter: ProgressReporter
) -> dict[str, TensorEdit]:
    """The edit of every tensor of the checkpoint; none where the opened model is written. Raises UserError for packed tensors."""
    if model.checkpoint.is_dequantized:
        return {}
    return plan_edits(model.checkpoint, model.structure.writers, operators, model.model)


def write(order: WriteRequest, folder: Path, reporter: ProgressReporter, stop: StopSignal) -> WriteResult:
    """The checkpoint's tensors, edited; of a GGUF file or a quantized checkpoint the model's, as it was opened."""
    template = read_template(order.settings)
    if not order.checkpoint.is_dequantized:
        return WriteResult(write_weights(order.checkpoint, order.prepared, folder, reporter, stop, template))
    # On the CPU in bfloat16: as it is to be written, with every tensor at hand, wherever the study had it.
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
    about = f"The base model is stored as {order.checkpoint.is_dequantized}; this one holds its numbers in bfloat16, with the edits made."
    return WriteResult(hashes, about=about, rounding=ROUNDED_AS_A_WHOLE)


def open_written(order: WriteRequest, folder: Path) -> Checkpoint:
    """As any model folder; its code, copied from a trusted model, is trusted."""
    trusted = order.checkpoint.model in order.settings.trust_remote_code
    return open_checkpoint(str(folder), trust_remote_code=[str(folder)] if trusted else [])


def read_back(order: WriteRequest, folder: Path) -> WrittenTensors | None:
    """The written tensors, which have the names of the checkpoint's; those of an opened model are other ones."""
    if order.checkpoint.is_dequantized:
        return None
    written = open_written(order, folder)
    slice_of = functools.lru_cache(maxsize=1)(written.slice_of)  # asked for several times, one tensor after the other

    def columns(name: str, where: Columns | None, expected: Tensor) -> tuple[Tensor, Tensor]:
        found = as_columns(written.read(name)) if where is None else where.of(slice_of(name))
        return found, rounding_of(expected, found.dtype)

    return WrittenTensors(order.prepared, columns, None if order.checkpoint.pickled else written.slice_of)


FORMAT = Format("an ordinary model folder", prepare, write, open_written, read_back=read_back)
