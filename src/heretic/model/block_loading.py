"""A model whose blocks are read from its files when they run, one at a time: for models larger than memory.

Measured on tiny models (dev/LOG.md), accelerate's disk offload copies fused experts to another folder first, 85 % of a Mixtral, and
reads a layer again at every call, which makes 9 to 11 reads of the checkpoint to find the writers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.model.architecture import decoder_blocks, find_residual_writers
from heretic.model.checkpoint import Checkpoint
from heretic.model.loading import LanguageModel, load_tokenizer, with_end_tokens
from heretic.model.meta_model import meta_model
from heretic.model.tensor_names import loaded_names
from heretic.progress import ProgressReporter


class BlockLoader:
    """Keeps the matrices of one block in memory, the one that ran last; those of the others are on PyTorch's meta device.

    Vectors (norms, biases) and all that is outside the blocks stay loaded. transformers' own loader reads the tensors, so renamed
    and fused ones become what they are in a model that is loaded whole.

    Args:
        model: The model on the meta device, apart from its buffers.
        checkpoint: Its checkpoint.
        device: Where it runs.
        stop: Checked before a block is read.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device, stop: StopSignal) -> None:
        self.model = cast(Any, model)
        self.checkpoint = checkpoint
        self.device = device
        self.stop = stop
        self.prefix, self.blocks = decoder_blocks(model)
        self.current: int | None = None  # the block in memory
        self.bytes_read = 0  # of blocks
        self._conversions: Any = get_model_conversion_mapping(model)
        # By block (None: always in memory) and parameter, the checkpoint's tensors that are loaded into it.
        self._sources: dict[int | None, dict[str, list[str]]] = {}
        self.model._weight_conversions = self._conversions
        own = model.state_dict()
        for tensor, parameter in loaded_names(model, checkpoint.tensors).items():
            if parameter in own:
                self._sources.setdefault(self._block_of(parameter, own), {}).setdefault(parameter, []).append(tensor)
        # Copies without memory, to replace what was loaded.
        self._empty = {n: p for n, p in model.named_parameters() if self._block_of(n, own) is not None}

    def _block_of(self, parameter: str, own: dict[str, torch.Tensor]) -> int | None:
        """Return the block that a matrix belongs to; None for what is always in memory."""
        if own[parameter].ndim < 2 or not parameter.startswith(f"{self.prefix}."):
            return None
        return int(parameter.removeprefix(f"{self.prefix}.").partition(".")[0])

    def attach(self) -> None:
        """Load what is always in memory, and let every block load its matrices before it runs. Raises UserError."""
        self._read(None)
        outside = {n for n, p in self.model.named_parameters(remove_duplicate=False) if p.is_meta} - {*self._empty}
        self.model.tie_weights(missing_keys=outside, recompute_mapping=False)
        self._check(set(dict(self.model.named_parameters())) - {*self._empty})
        for module in self.model.modules():
            module._buffers.update({n: b.to(self.device) for n, b in module._buffers.items() if b is not None})
        for layer, block in enumerate(self.blocks):
            block.forward = partial(self._run, layer, block.forward)

    def load(self, layer: int) -> None:
        """Put the matrices of this block into memory in place of those of the block before. Raises UserError."""
        if layer == self.current:
            return
        self.stop.check()
        self._free_current()
        self.current = layer
        try:
            self._read(layer)
            self._check({name for name in self._empty if name.startswith(f"{self.prefix}.{layer}.")})
        except BaseException:
            self._free_current()
            raise
        names = (name for sources in self._sources.get(layer, {}).values() for name in sources)
        self.bytes_read += sum(self.checkpoint.tensors[name].nbytes for name in names)

    def _run(self, layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.load(layer)
        return forward(*args, **kwargs)

    def _free_current(self) -> None:
        for name, empty in self._empty.items():
            if name.startswith(f"{self.prefix}.{self.current}."):
                path, _, attribute = name.rpartition(".")
                self.model.get_submodule(path)._parameters[attribute] = empty
        self.current = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _read(self, layer: int | None) -> None:
        """Read a block's matrices, one parameter at a time: fusing experts takes the memory of one tensor more."""
        dtype = self.model.dtype
        how = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=self._conversions,
        )
        for parameter, names in self._sources.get(layer, {}).items():
            slices = {name: self.checkpoint.slice_of(name) for name in names}
            report, _ = convert_and_load_state_dict_in_model(self.model, slices, how)
            if problems := [*report.conversion_errors.values(), *report.mismatched_keys]:
                raise UserError(
                    f"{parameter} cannot be loaded: {problems[0]}"[:300],
                    code="model-not-loadable",
                    where=str(self.checkpoint.folder),
                    fix="compare config.json with that of the repository of the weights",
                )
        self.model._weight_conversions = self._conversions  # it held those of the last parameter
        self.model.requires_grad_(False)

    def _check(self, names: set[str]) -> None:
        """Raise UserError if one of these parameters was not loaded."""
        parameters = dict(self.model.named_parameters())
        if missing := sorted(name for name in names if parameters[name].is_meta):
            raise UserError(
                f"The checkpoint lacks {len(missing)} of the model's tensors, such as {missing[0]}.",
                code="missing-tensors",
                where=str(self.checkpoint.folder),
                fix="download the model again",
            )


def load_by_block(
    checkpoint: Checkpoint,
    dtype: str,
    device: torch.device,
    *,
    trust_remote_code: list[str] | None = None,
    chat_template: str | None = "",
    reporter: ProgressReporter,
    stop: StopSignal | None = None,
) -> LanguageModel:
    """Load tokenizer and model, but of the model's blocks only one at a time, when it runs.

    Arguments as for `model.loading.load`. Raises UserError for a checkpoint that is not safetensors in full precision, or a model
    whose blocks share weights.
    """
    check_readable_by_block(checkpoint)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(checkpoint, checkpoint.model in (trust_remote_code or []), chat_template)
    with reporter.stage(f"Loading {checkpoint.model} as {dtype}, block by block", None):
        model = meta_model(checkpoint, dtype, buffers=False).eval()
        loader = BlockLoader(model, checkpoint, device, stop or StopSignal())
        _check_unshared(loader.blocks, checkpoint)
        loader.attach()
        with torch.inference_mode():
            structure = find_residual_writers(model)
    return with_end_tokens(LanguageModel(model, tokenizer, checkpoint, structure, dtype, loader=loader))


def check_readable_by_block(checkpoint: Checkpoint) -> None:
    """Raise UserError unless the tensors can be read one by one and edited as they are stored."""
    if checkpoint.obstacle:
        raise UserError(
            f"A model cannot be read block by block from {checkpoint.obstacle}.",
            code="not-by-block",
            where=str(checkpoint.folder),
            fix="use the model as safetensors in full precision",
        )


def _check_unshared(blocks: nn.ModuleList, checkpoint: Checkpoint) -> None:
    seen: set[int] = set()
    for layer, block in enumerate(blocks):
        own = {id(parameter) for parameter in block.parameters()}
        if own & seen:
            raise UserError(
                f"Block {layer} shares weights with an earlier one, so the blocks cannot be read one by one.",
                code="not-by-block",
                where=str(checkpoint.folder),
                fix="use a machine that holds the model",
            )
        seen |= own
