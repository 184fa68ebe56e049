"""Find the modules of a decoder-only transformer that write to its residual stream.

No table of architectures is needed. A writer is a linear layer in a block whose output is as wide as the stream, which has a usual
name of an output projection, and whose output affects the block's output (probed once).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from heretic.errors import UserError
from heretic.model import moe
from heretic.model.moe import ExpertGroup
from heretic.model.probe import input_device, probe
from heretic.model.reader import READING, find_readers
from heretic.model.writer import ResidualWriter, first_tensor, output_width

__all__ = ["ModelStructure", "ResidualWriter", "find_residual_writers", "first_tensor", "input_device"]

# Last part of a writer's name -> its component. Names with "" occur in both components: the parent's name decides.
WRITER_NAMES = {
    "o_proj": "attention", "out_proj": "attention", "wo": "attention", "o": "attention", "o_b_proj": "attention",
    "linear_out": "attention", "linear_right": "attention",
    "down_proj": "mlp", "fc2": "mlp", "w2": "mlp", "fc_out": "mlp", "dense_4h_to_h": "mlp", "linear_2": "mlp", "proj_out": "mlp",
    "output_linear": "mlp", "per_layer_projection": "mlp", "proj_down": "mlp",
    "dense": "", "c_proj": "", "proj": "", "Wo": "",
}  # fmt: skip
COMPONENTS = ("attention", "mlp")  # of writers


@dataclass(frozen=True)
class ModelStructure:
    """The decoder blocks of a model and its edited modules: the residual writers in order of layers, then the readers."""

    blocks: nn.ModuleList
    width: int  # of the residual stream
    writers: tuple[ResidualWriter, ...]
    unrecognized: tuple[str, ...]  # modules named like writers that do not act like one
    # Blocks whose stream other modules write to, or whose output is not [rows, tokens, width] (several parallel streams).
    incomplete: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def components(self) -> tuple[str, ...]:
        """The components of this model's edited modules."""
        present = {w.component for w in self.writers}
        return tuple(c for c in (*COMPONENTS, *READING) if c in present)

    @property
    def writing_components(self) -> tuple[str, ...]:
        """The components of the modules that write to the stream."""
        return tuple(c for c in self.components if c in COMPONENTS)


def find_residual_writers(model: PreTrainedModel, *, readers: bool = False) -> ModelStructure:
    """Find the blocks and the writers of `model`, and probe each writer once; with `readers` also the readers.

    Raises:
        UserError: "architecture-not-supported" if the model has no recognized blocks, writers or, if asked for, readers.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    prefix, blocks = decoder_blocks(model)
    writers: list[ResidualWriter] = []
    experts: list[ExpertGroup] = []
    unrecognized: list[str] = []
    for layer, block in enumerate(blocks):
        name = f"{prefix}.{layer}"
        writers = _merge_tied(writers, _candidates(block, layer, name, width))
        block_experts, unclear = moe.experts_in(block, layer, name, width)
        experts += [e for e in block_experts if all(e.parts[0].owner is not other.parts[0].owner for other in experts)]
        unrecognized += unclear
    writers, unclear = moe.merge_experts(model, blocks, experts, writers)
    probed = probe(model, prefix, blocks, writers)
    writers = probed.writers
    unrecognized += [*unclear, *sorted(probed.silent)]
    if not writers:
        raise UserError(
            f"heretic found no module in this model ({type(model).__name__}) that writes to the residual stream.",
            code="architecture-not-supported",
            where=f"blocks at '{prefix}', {len(blocks)} layers, width {width}",
            fix="add the names of its output projections to WRITER_NAMES in src/heretic/model/architecture.py",
        )
    reading = find_readers(model, prefix, blocks, width, writers) if readers else []
    if readers and not reading:
        raise UserError(
            f"heretic found no module in this model ({type(model).__name__}) that reads the stream through an RMS norm "
            "with weights.",
            code="architecture-not-supported",
            where="ablation.readers",
            fix="ablation.readers = false",
        )
    return ModelStructure(blocks, width, (*writers, *reading), tuple(unrecognized), tuple(probed.incomplete))


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the decoder blocks and their name: the outermost ModuleList with as many entries as the config has layers.

    Raises UserError without one.
    """
    text_config = model.config.get_text_config(decoder=True)
    # LongCat counts two layers a block, and has its number of blocks in `num_layers`.
    counts = {text_config.num_hidden_layers, getattr(text_config, "num_layers", None)}
    towers = ("vision", "visual", "audio", "encoder")
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts and not any(t in name for t in towers):
            return name, module
    raise UserError(
        f"heretic cannot find the decoder blocks of this model ({type(model).__name__}).",
        code="architecture-not-supported",
        where=f"expected a ModuleList of {sorted(c for c in counts if c)} modules",
        fix="report the architecture; decoder_blocks in src/heretic/model/architecture.py has to find it",
    )


def _candidates(block: nn.Module, layer: int, prefix: str, width: int) -> list[ResidualWriter]:
    """Writers of a block, selected by name and width."""
    candidates = []
    for path, module in block.named_modules():
        *parents, last = path.split(".")
        if last not in WRITER_NAMES or output_width(module) != width or "experts" in parents:
            continue
        component = WRITER_NAMES[last] or ("attention" if any("att" in p.lower() for p in parents) else "mlp")
        candidates.append(ResidualWriter(f"{prefix}.{path}", layer, component, module))
    return candidates


def _merge_tied(writers: list[ResidualWriter], more: list[ResidualWriter]) -> list[ResidualWriter]:
    """Add the writers of another block. A writer that shares its weight with an earlier one (Zamba) is tied to that one, since a
    weight can have only one edit."""
    for writer in more:
        tied = next((w for w in writers if w.module is writer.module or _weight(w) is _weight(writer)), None)
        if tied is None:
            writers = [*writers, writer]
        elif tied.module is not writer.module:
            writers = [replace(w, tied_modules=(*w.tied_modules, writer.module)) if w is tied else w for w in writers]
    return writers


def _weight(writer: ResidualWriter) -> object:
    return writer.module.weight
