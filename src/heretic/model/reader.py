"""Find the modules of a block that read the residual stream through an RMS norm: query, key, value, gate and up projections.

No names are needed: a reader is a linear layer whose input is the output of a norm of the stream. Such a norm has the block's own
input as its input while all writers are zero-ablated. Modules that choose experts or tokens do not count: an edit would change
what they choose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic.model.probe import Arguments, block_inputs, run_block, stream_of, zero_ablate
from heretic.model.writer import ResidualWriter, output_width, scale_of

READING = ("attention_inputs", "mlp_inputs")  # components: readers of a block's first norm, and those of the others
# Names of readers whose rows GGUF files keep whole.
IN_ORDER = {"q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj"}
SAME = 2e-2  # relative difference that counts as rounding in half precision
CHOOSING = {"gate", "router", "shared_expert_gate", "indexer", "compressor"}  # parts of the names of what chooses


@torch.inference_mode()
def find_readers(
    model: PreTrainedModel, prefix: str, blocks: nn.ModuleList, width: int, writers: Sequence[ResidualWriter]
) -> list[ResidualWriter]:
    """Run every block once on a few tokens, and return its readers. Weights that several blocks share are left out."""
    inputs = block_inputs(model, blocks)
    found: list[ResidualWriter] = []
    for layer, block in enumerate(blocks):
        if layer in inputs:
            found += _readers_in(block, layer, f"{prefix}.{layer}", width, writers, inputs[layer])
    uses = Counter(id(m.weight) for block in blocks for m in block.modules() if output_width(m))
    return [reader for reader in found if uses[id(reader.module.weight)] == 1]


def _readers_in(
    block: nn.Module, layer: int, name: str, width: int, writers: Sequence[ResidualWriter], inputs: Arguments
) -> list[ResidualWriter]:
    modules = dict(block.named_modules())
    norms = [path for path, module in modules.items() if "RMSNorm" in type(module).__name__]
    modules = {path: m for path, m in modules.items() if not any(path.startswith(f"{norm}.") for norm in norms)}
    own = {module for writer in writers for module in writer.modules}
    stream = stream_of(inputs)
    normed: dict[nn.Module, Tensor] = {}  # outputs of the norms of the stream, in order
    read: dict[str, nn.Module] = {}  # the norm by path of reader

    def record(norm: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if stream is None or not given or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
            return
        wide = given[0].shape[-1] == width == output.shape[-1]
        if wide and _proportional(given[0], stream) and _is_plain(norm, given[0]):
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
        if path in norms:
            hooks.append((module, record))
        elif output_width(module) and module not in own and not CHOOSING & set(path.split(".")):
            hooks.append((module, compare(path)))
    run_block(block, inputs, hooks)
    first = next(iter(normed), None)
    return [
        ResidualWriter(f"{name}.{path}", layer, READING[norm is not first], modules[path], input_norm=norm)
        for path, norm in read.items()
    ]


def _is_plain(norm: nn.Module, given: Tensor) -> bool:
    """Return whether a norm with weights S returns S x / rms(x), without anything else such as a gate."""
    scale = scale_of(norm)
    return scale is not None and _proportional(norm.forward(given), scale * given.float())


def _proportional(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal at every token, up to a factor."""
    if a.numel() != b.numel():
        return False
    a = a.reshape(b.shape).float()
    b = b.to(a.device).float()
    factor = (a * b).sum(-1, keepdim=True) / (b * b).sum(-1, keepdim=True).clamp_min(1e-30)
    return bool(((a - factor * b).norm(dim=-1) <= SAME * a.norm(dim=-1)).all())


def reordered(writers: Sequence[ResidualWriter]) -> str:
    """Return the name of a reader whose rows a GGUF file splits or reorders, so that they cannot be verified; "" without one."""
    return next((w.name for w in writers if w.reads_stream and w.name.rpartition(".")[2] not in IN_ORDER), "")


def _same_memory(output: Tensor, given: Tensor) -> bool:
    """Return whether a module got this tensor, or all of it in another shape."""
    return output.data_ptr() == given.data_ptr() and output.numel() == given.numel()
