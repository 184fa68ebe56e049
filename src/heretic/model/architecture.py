"""Which modules of a decoder-only transformer write to its residual stream.

Found without a table of architectures: inside every block, a linear map whose output is as wide as the stream, whose name
is a usual one for an output projection, and which, when its output is changed, changes what the block adds to the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heretic.errors import UserError
from heretic.model import moe as mixtures
from heretic.model.moe import ExpertGroup
from heretic.model.probe import input_device, probe
from heretic.model.writer import ResidualWriter, first_tensor

__all__ = ["ModelStructure", "ResidualWriter", "find_residual_writers", "first_tensor", "input_device"]

# The last part of a writer's name, and the component it belongs to. `dense` and `c_proj` are used for both kinds; there the
# name of the module that holds it decides.
WRITER_NAMES = {
    "o_proj": "attention", "out_proj": "attention", "wo": "attention", "o": "attention", "o_b_proj": "attention",
    "linear_out": "attention", "linear_right": "attention",
    "down_proj": "mlp", "fc2": "mlp", "w2": "mlp", "fc_out": "mlp", "dense_4h_to_h": "mlp", "linear_2": "mlp", "proj_out": "mlp",
    "output_linear": "mlp", "per_layer_projection": "mlp", "proj_down": "mlp",
    "dense": "", "c_proj": "", "proj": "", "Wo": "",
}  # fmt: skip
COMPONENTS = ("attention", "mlp")


@dataclass(frozen=True)
class ModelStructure:
    """The blocks of a model, its writers in order of layers, and the names that were not understood.

    `incomplete`: names of the blocks to whose stream something is added that is not a writer's, or that hand on something else
    than hidden states [rows, tokens, width] (several streams side by side).
    """

    blocks: nn.ModuleList
    width: int
    writers: tuple[ResidualWriter, ...]
    unrecognized: tuple[str, ...]
    incomplete: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def components(self) -> tuple[str, ...]:
        """The kinds of writers that this model has."""
        present = {w.component for w in self.writers}
        return tuple(c for c in COMPONENTS if c in present)


def find_residual_writers(model: PreTrainedModel) -> ModelStructure:
    """Find the blocks and the writers of `model`, and probe each writer once. Raises UserError when there are none."""
    text_config = model.config.get_text_config(decoder=True)
    width = text_config.hidden_size
    prefix, blocks = _blocks(model, {text_config.num_hidden_layers, getattr(text_config, "num_layers", None)})
    writers: list[ResidualWriter] = []
    experts: list[ExpertGroup] = []
    unknown: list[str] = []
    for layer, block in enumerate(blocks):
        name = f"{prefix}.{layer}"
        writers = _joined(writers, _candidates(block, layer, name, width))
        found, unclear = mixtures.experts_in(block, layer, name, width)
        experts += [e for e in found if all(e.parts[0].owner is not known.parts[0].owner for known in experts)]
        unknown += unclear
    writers, unclear = mixtures.merge_experts(model, blocks, experts, writers)
    probed = probe(model, prefix, blocks, writers)
    writers = probed.writers
    unknown += [*unclear, *sorted(probed.silent)]
    if not writers:
        raise UserError(
            f"No module of this model ({type(model).__name__}) was recognized as writing to the residual stream.",
            code="architecture-not-supported",
            where=f"blocks at '{prefix}', {len(blocks)} layers, width {width}",
            fix="add the names of its output projections to WRITER_NAMES in src/heretic/model/architecture.py",
        )
    return ModelStructure(blocks, width, tuple(writers), tuple(unknown), tuple(probed.incomplete))


def _blocks(model: PreTrainedModel, counts: set[int | None]) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks: the outermost list of modules with as many entries as the config has layers.

    (LongCat counts two layers a block, and the blocks under another name.)"""
    towers = ("vision", "visual", "audio", "encoder")
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts and not any(t in name for t in towers):
            return name, module
    raise UserError(
        f"The blocks of this model ({type(model).__name__}) were not found.",
        code="architecture-not-supported",
        where=f"a list of {sorted(c for c in counts if c)} modules was expected",
        fix="report the architecture; it needs a line in src/heretic/model/architecture.py",
    )


def _output_width(module: nn.Module) -> int | None:
    """Output width of a linear map of any make (quantized ones carry `out_features` too); None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.nf)
    width = getattr(module, "out_features", None)
    return width if isinstance(width, int) and getattr(module, "weight", None) is not None else None


def _candidates(block: nn.Module, layer: int, prefix: str, width: int) -> list[ResidualWriter]:
    """Writers by name and width."""
    found = []
    for path, module in block.named_modules():
        *parents, last = path.split(".")
        if last not in WRITER_NAMES or _output_width(module) != width or "experts" in parents:
            continue
        component = WRITER_NAMES[last] or ("attention" if any("att" in p.lower() for p in parents) else "mlp")
        found.append(ResidualWriter(f"{prefix}.{path}", layer, component, module))
    return found


def _joined(writers: list[ResidualWriter], more: list[ResidualWriter]) -> list[ResidualWriter]:
    """Writers with those of another block; one whose weight an earlier block uses too (Zamba) becomes that one's twin, since one
    weight can have only one edit."""
    for writer in more:
        twin = next((w for w in writers if w.module is writer.module or _weight(w) is _weight(writer)), None)
        if twin is None:
            writers = [*writers, writer]
        elif twin.module is not writer.module:
            writers = [replace(w, tied_modules=(*w.tied_modules, writer.module)) if w is twin else w for w in writers]
    return writers


def _weight(writer: ResidualWriter) -> object:
    return writer.module.weight
