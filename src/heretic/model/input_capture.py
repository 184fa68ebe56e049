"""Capture the inputs of residual writers at some tokens of some sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heretic.model.batching import Batch, Batcher
from heretic.model.forward import hidden_states
from heretic.model.loading import LanguageModel
from heretic.model.patching import forward_hooks
from heretic.model.transfer import HostCopies, Index
from heretic.model.turns import Turns
from heretic.model.writer import ResidualWriter, first_tensor


def writer_inputs(
    language_model: LanguageModel,
    writers: Sequence[ResidualWriter],
    name: str,
    sequences: Sequence[list[int]],
    offsets: Sequence[Sequence[int]],
    batcher: Batcher,
) -> dict[str, Tensor]:
    """Return what each writer reads at the chosen tokens, float32 [tokens, inputs] in RAM, in the order of the sequences.

    Args:
        language_model: The loaded model; its logits are not computed.
        writers: Linear layers. Those that are not called with one vector a token are missing from the result.
        name: Of the stage on the screen.
        sequences: Token ids.
        offsets: The chosen tokens of each sequence, counted from its end: 1 is the last one.
        batcher: Runs the batches, without prefix caching: every pass needs all tokens.
    """
    starts = [sum(map(len, offsets[:i])) for i in range(len(offsets))]
    total = sum(map(len, offsets))
    found: dict[str, Tensor] = {}
    other: set[str] = set()  # writers that are called otherwise

    def step(batch: Batch) -> Turns[list[None]]:
        rows, tokens = batch.input_ids.shape
        row = [r for r, i in enumerate(batch.rows) for _ in offsets[i]]
        token = [tokens - offset for i in batch.rows for offset in offsets[i]]
        where = Index([row, token])
        places = torch.tensor([starts[i] + n for i in batch.rows for n in range(len(offsets[i]))], dtype=torch.long)
        captured: dict[str, Tensor] = {}
        copies = HostCopies()
        with forward_hooks((w.module, _recording(w, captured, copies, (rows, tokens), where, other)) for w in writers):
            hidden_states(language_model.model, batch, use_cache=False)
        yield
        copies.wait()
        for writer, keys in captured.items():
            if writer not in found:
                found[writer] = torch.zeros(total, keys.shape[1])
            found[writer][places] = keys
        return [None] * len(batch.rows)

    batcher.run(name, sequences, step)
    return {writer: keys for writer, keys in found.items() if writer not in other}


def _recording(
    writer: ResidualWriter,
    captured: dict[str, Tensor],
    copies: HostCopies,
    shape: tuple[int, int],
    where: Index,
    other: set[str],
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x, y = inputs[0] if inputs else None, first_tensor(output)
        count = shape[0] * shape[1]
        if not isinstance(x, Tensor) or x.numel() != count * x.shape[-1] or y.numel() != count * y.shape[-1]:
            other.add(writer.name)
            return
        row, token = where.on(x.device)
        captured[writer.name] = copies.copy(x.reshape(*shape, -1)[row, token].float())

    return hook


def input_width(writer: ResidualWriter) -> int:
    """Return the width of a linear writer's input."""
    (weight,) = (part for part in writer.parts if not part.is_bias)
    return weight.shape[0 if weight.transposed else 1]
