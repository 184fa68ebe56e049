"""Find the modules of a block that read the residual stream through an RMS norm: query, key, value, gate and up projections.

No names are needed: a reader is a linear layer whose input is the output of a norm as wide as the stream. A router of experts is
none, since an edit would choose other experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic.model.patching import forward_hooks
from heretic.model.probe import Arguments, block_inputs
from heretic.model.writer import ResidualWriter, output_width

READING = {"attention": "attention_inputs", "mlp": "mlp_inputs"}  # component of readers, by where they are
ROUTERS = ("gate", "router", "shared_expert_gate")  # last part of a name


@torch.inference_mode()
def find_readers(model: PreTrainedModel, prefix: str, blocks: nn.ModuleList, width: int) -> list[ResidualWriter]:
    """Run every block once on a few tokens, and return its readers. Modules that several blocks share are left out."""
    inputs = block_inputs(model, blocks)
    found: list[ResidualWriter] = []
    for layer, block in enumerate(blocks):
        if layer in inputs:
            found += _readers_in(block, layer, f"{prefix}.{layer}", width, inputs[layer])
    uses = [id(reader.module) for reader in found]
    return [reader for reader in found if uses.count(id(reader.module)) == 1]


def _readers_in(block: nn.Module, layer: int, name: str, width: int, inputs: Arguments) -> list[ResidualWriter]:
    modules = dict(block.named_modules())
    norms = [m for m in modules.values() if "RMSNorm" in type(m).__name__ and any(True for _ in m.parameters())]
    linear = {path: m for path, m in modules.items() if output_width(m) and path.split(".")[-1] not in ROUTERS}
    normed: list[tuple[nn.Module, Tensor]] = []
    readers: list[ResidualWriter] = []

    def record(norm: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1] == width:
            normed.append((norm, output))

    def compare(path: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if not given or not isinstance(given[0], Tensor):
            return
        norm = next((norm for norm, output in normed if _same_memory(output, given[0])), None)
        if norm is not None and all(reader.module is not module for reader in readers):
            part = (
                "attention" if any("att" in p.lower() or "mixer" in p.lower() for p in path.split(".")[:-1]) else "mlp"
            )
            readers.append(ResidualWriter(f"{name}.{path}", layer, READING[part], module, input_norm=norm))

    hooks: list[tuple[nn.Module, Any]] = [(norm, record) for norm in norms]
    hooks += [(m, lambda m, given, _o, path=path: compare(path, m, given)) for path, m in linear.items()]
    with forward_hooks(hooks):
        args, kwargs = inputs
        block(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)
    return readers


def _same_memory(output: Tensor, given: Tensor) -> bool:
    """Return whether a module got this tensor, or all of it in another shape."""
    return output is given or (output.data_ptr() == given.data_ptr() and output.numel() == given.numel())
