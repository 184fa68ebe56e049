"""A model without memory, on PyTorch's meta device."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING

from heretic.errors import UserError, first_line, plain_line
from heretic.model.checkpoint import Checkpoint
from heretic.model.config_reading import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def meta_model(checkpoint: Checkpoint, dtype: str, *, buffers: bool = True) -> PreTrainedModel:
    """Build the model on PyTorch's meta device, without memory. Raises UserError if transformers cannot build it.

    Args:
        checkpoint: The checkpoint.
        dtype: Of the parameters.
        buffers: Whether buffers are on the meta device too; a mask can be as large as the square of the context.
    """
    import torch
    from accelerate import init_empty_weights

    config = copy.deepcopy(checkpoint.config)
    trusted = checkpoint.own_code
    auto = auto_class(config, trusted)
    file = str(checkpoint.folder / "config.json")
    try:
        with torch.device("meta") if buffers else nullcontext(), init_empty_weights(include_buffers=buffers):
            model: PreTrainedModel = auto.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trusted)
    except Exception as error:  # the model's own code can raise anything
        raise UserError(
            f"transformers cannot build {checkpoint.model} from its config: {first_line(error)[:250]}",
            code="model-not-buildable",
            where=file,
            fix="use the config.json of the weights' repository, or a model that transformers supports",
        ) from error
    _check_shapes(model, checkpoint, file)
    return model


def _check_shapes(model: PreTrainedModel, checkpoint: Checkpoint, file: str) -> None:
    """Raise UserError if shapes from the config differ from the checkpoint's, apart from swapped axes of experts."""
    for name, parameter in model.state_dict().items():
        stored = checkpoint.tensors.get(name)
        if stored is None or stored.is_packed or checkpoint.gguf_file or checkpoint.quantized_by:
            continue
        if sorted(stored.shape) != sorted(parameter.shape):
            raise UserError(
                f"{plain_line(name)[:100]} has the shape {list(stored.shape)} in "
                f"{stored.file.name if stored.file else 'the weights'}, but config.json gives {list(parameter.shape)}.",
                code="config-size-mismatch",
                where=file,
                fix="use the config.json of the weights' repository",
            )
