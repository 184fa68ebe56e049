"""Find the modules of a block that read the residual stream through an RMS norm: query, key, value, gate and up projections.

No names are needed: a reader is a linear layer whose input is the output of a norm of the stream. Such a norm has the block's own
input as its input while all writers are zero-ablated. What chooses experts or tokens is none, since an edit would choose others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic.model.patching import forward_hooks
from heretic.model.probe import Arguments, block_inputs, stream_of, zero_ablate
from heretic.model.writer import ResidualWriter, output_width

READING = ("attention_inputs", "mlp_inputs")  # components: readers of a block's first norm, and those of the others
CHOOSING = {"gate", "router", "shared_expert_gate", "indexer", "compressor"}  # parts of the names of what chooses


@torch.inference_mode()
def find_readers(
    model: PreTrainedModel, prefix: str, blocks: nn.ModuleList, writers: Sequence[ResidualWriter]
) -> list[ResidualWriter]:
    """Run every block once on a few tokens, and return its readers. Weights that several blocks share are left out."""
    inputs = block_inputs(model, blocks)
    found: list[ResidualWriter] = []
    for layer, block in enumerate(blocks):
        if layer in inputs:
            found += _readers_in(block, layer, f"{prefix}.{layer}", writers, inputs[layer])
    uses = Counter(id(m.weight) for block in blocks for m in block.modules() if output_width(m))
    return [reader for reader in found if uses[id(reader.module.weight)] == 1]


def _readers_in(
    block: nn.Module, layer: int, name: str, writers: Sequence[ResidualWriter], inputs: Arguments
) -> list[ResidualWriter]:
    modules = dict(block.named_modules())
    own = {module for writer in writers for module in writer.modules}
    normed: dict[nn.Module, Tensor] = {}  # outputs of the norms of the stream, in order
    read: dict[str, nn.Module] = {}  # the norm by path of reader

    def record(norm: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(output, Tensor) and _is_stream(given[0], stream_of(inputs)):
            normed[norm] = output

    def compare(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Any, ...], _output: Any) -> None:
            if given and isinstance(given[0], Tensor):
                norm = next((norm for norm, output in normed.items() if _same_memory(output, given[0])), None)
                if norm is not None:
                    read[path] = norm

        return hook

    hooks: list[tuple[nn.Module, Callable[..., Any]]] = [
        (module, zero_ablate) for module in own & set(modules.values())
    ]
    for path, module in modules.items():
        if "RMSNorm" in type(module).__name__ and any(True for _ in module.parameters()):
            hooks.append((module, record))
        elif output_width(module) and module not in own and not CHOOSING & set(path.split(".")):
            hooks.append((module, compare(path)))
    with forward_hooks(hooks):
        args, kwargs = inputs
        block(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)
    first = next(iter(normed), None)
    return [
        ResidualWriter(f"{name}.{path}", layer, READING[norm is not first], modules[path], input_norm=norm)
        for path, norm in read.items()
    ]


def _is_stream(given: Any, stream: Tensor | None) -> bool:
    """Return whether a norm's input is the block's."""
    if not isinstance(given, Tensor) or stream is None or given.numel() != stream.numel():
        return False
    return torch.allclose(given.reshape(stream.shape).float(), stream.to(given.device).float(), rtol=1e-2, atol=1e-4)


def _same_memory(output: Tensor, given: Tensor) -> bool:
    """Return whether a module got this tensor, or all of it in another shape."""
    return output.data_ptr() == given.data_ptr() and output.numel() == given.numel()
