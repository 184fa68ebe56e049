"""Which modules of a decoder-only transformer write to its residual stream.

Found without a table of architectures: inside every block, a linear map whose output is as wide as the stream, whose name
is a usual one for an output projection, and which, when its output is changed, changes what the block adds to the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heretic.errors import UserError

# The last part of a writer's name, and the component it belongs to. `dense` and `c_proj` are used for both kinds; there the
# name of the module that holds it decides.
WRITER_NAMES = {
    "o_proj": "attention", "out_proj": "attention", "wo": "attention", "o": "attention",
    "down_proj": "mlp", "fc2": "mlp", "w2": "mlp", "fc_out": "mlp", "dense_4h_to_h": "mlp", "linear_2": "mlp", "proj_out": "mlp",
    "dense": "", "c_proj": "", "proj": "",
}  # fmt: skip
COMPONENTS = ("attention", "mlp")


@dataclass(frozen=True)
class Writer:
    """A module whose output is added to the residual stream."""

    name: str
    layer: int
    component: str
    module: nn.Module
    norm: nn.Module | None = None  # that its output passes before it is added (Gemma 2 and 3, OLMo 2)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in, out] (GPT-2's Conv1D) instead of [out, in]."""
        return isinstance(self.module, Conv1D)

    @property
    def offloaded(self) -> bool:
        """Whether accelerate keeps the weight elsewhere between passes, leaving an empty one in the module."""
        return bool(self.module.weight.device.type == "meta")

    def weight(self) -> Tensor:
        """The weight [width of the stream, inputs] in its own type."""
        weight = cast(Tensor, self.module.weight).detach()
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def scale(self) -> Tensor | None:
        """Effective weight [width] in float32 of the RMS norm that its output passes; None without one.

        Asked of the norm itself, since some add 1 to what they store: for an input of ones it is the output.
        """
        if self.norm is None:
            return None
        stored = next(self.norm.parameters())
        return cast(
            Tensor, self.norm(torch.ones(1, 1, len(stored), dtype=stored.dtype, device=stored.device))[0, 0].float()
        )


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a model, its writers in order of layers, and the names that were not understood."""

    blocks: nn.ModuleList
    width: int
    writers: tuple[Writer, ...]
    not_understood: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def components(self) -> tuple[str, ...]:
        """The kinds of writers that this model has."""
        present = {w.component for w in self.writers}
        return tuple(c for c in COMPONENTS if c in present)


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the blocks and the writers of `model`, and probe each writer once. Raises UserError when there are none."""
    text_config = model.config.get_text_config(decoder=True)
    width = text_config.hidden_size
    prefix, blocks = _blocks(model, text_config.num_hidden_layers)
    writers: list[Writer] = []
    unknown: list[str] = []
    for layer, block in enumerate(blocks):
        found, other = _candidates(block, layer, f"{prefix}.{layer}", width)
        writers += found
        unknown += other
    silent, norms = _probe(model, blocks, writers)
    writers = [replace(w, norm=norms.get(w.name)) for w in writers if w.name not in silent]
    unknown += sorted(silent)
    if not writers:
        raise UserError(
            f"No module of this model ({type(model).__name__}) was recognised as writing to the residual stream.",
            where=f"blocks at '{prefix}', {len(blocks)} layers, width {width}",
            fix="add the names of its output projections to WRITER_NAMES in src/heretic/model/anatomy.py",
        )
    return Anatomy(blocks, width, tuple(writers), tuple(unknown))


def _blocks(model: PreTrainedModel, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks: the outermost list of modules with as many entries as the config has layers."""
    towers = ("vision", "visual", "audio", "encoder")
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not any(t in name for t in towers):
            return name, module
    raise UserError(
        f"The blocks of this model ({type(model).__name__}) were not found.",
        where=f"a list of {num_layers} modules was expected",
        fix="report the architecture; it needs a line in src/heretic/model/anatomy.py",
    )


def _output_width(module: nn.Module) -> int | None:
    """Output width of a linear map of any make (quantised ones carry `out_features` too); None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.nf)
    width = getattr(module, "out_features", None)
    return width if isinstance(width, int) and getattr(module, "weight", None) is not None else None


def _candidates(block: nn.Module, layer: int, prefix: str, width: int) -> tuple[list[Writer], list[str]]:
    """Writers by name and width, and what writes in a way that is not understood (mixtures of experts)."""
    found, unknown = [], []
    for path, module in block.named_modules():
        *parents, last = path.split(".")
        if last in ("experts", "shared_expert", "shared_experts"):
            unknown.append(f"{prefix}.{path}")
        if last not in WRITER_NAMES or _output_width(module) != width:
            continue
        if any(p in ("experts", "shared_expert", "shared_experts") for p in parents):
            continue
        component = WRITER_NAMES[last] or ("attention" if any("att" in p.lower() for p in parents) else "mlp")
        found.append(Writer(f"{prefix}.{path}", layer, component, module))
    return found, unknown


@torch.inference_mode()
def _probe(
    model: PreTrainedModel, blocks: nn.ModuleList, writers: list[Writer]
) -> tuple[set[str], dict[str, nn.Module]]:
    """Names of the candidates whose output has no effect on what their block hands on; and by the others' names the norm that
    their output goes straight into.

    Two tokens pass through the model once; then every block is run again on the input that it had, with one candidate's
    output moved. This costs a few blocks' worth of two tokens each, on any device map.
    """
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: calls.update({i: (args, kwargs)}), with_kwargs=True
        )
        for i, block in enumerate(blocks)
    ]
    try:
        tokens = torch.tensor([[1, 2]], device=input_device(model))
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    silent = set()
    norms: dict[str, nn.Module] = {}
    for layer, block in enumerate(blocks):
        args, kwargs = calls[layer]
        with _normed(block, [w for w in writers if w.layer == layer], norms):
            before = first_tensor(block(*args, **kwargs))
        for writer in (w for w in writers if w.layer == layer):
            handle = writer.module.register_forward_hook(lambda _m, _i, output: output + output.abs().mean() + 0.1)
            try:
                moved = first_tensor(block(*args, **kwargs)) - before
            finally:
                handle.remove()
            if not moved.abs().max() > 0:
                silent.add(writer.name)
    return silent, norms


@contextmanager
def _normed(block: nn.Module, writers: list[Writer], found: dict[str, nn.Module]) -> Iterator[None]:
    """While the block runs, note which norm each writer's output goes straight into."""
    outputs: dict[str, Tensor] = {}

    def wrote(writer: Writer) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: outputs.update({writer.name: output})

    def reads(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        for name, output in outputs.items():
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].data_ptr() == output.data_ptr():
                found[name] = norm

    handles = [w.module.register_forward_hook(wrote(w)) for w in writers]
    handles += [m.register_forward_pre_hook(reads) for m in block.modules() if "RMSNorm" in type(m).__name__]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of the input embeddings, where token ids go in."""
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.device.type == "meta":  # offloaded; accelerate knows where it will be when it is used
        return torch.device(embeddings._hf_hook.execution_device)
    return cast(torch.device, embeddings.weight.device)


def first_tensor(output: Any) -> Tensor:
    """The hidden states [rows, tokens, width] out of what a block returns: a tensor, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]
