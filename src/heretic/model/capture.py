"""Residuals: what the stream holds after every block at a prompt's last token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.model.architecture import first_tensor
from heretic.model.batching import Batch, Batcher
from heretic.model.forward import hidden_states
from heretic.model.loading import LanguageModel


@dataclass(frozen=True)
class ResidualMeans:
    """Mean residual after every block [layers, width] in float64, over `count` prompts.

    `each` are those of every prompt [prompts, layers, width] in float32 on the CPU, where they were asked for.
    """

    mean: Tensor
    count: int
    per_prompt: Tensor | None = None

    @property
    def require_per_prompt(self) -> Tensor:
        """`each`, for whoever cannot do without."""
        if self.per_prompt is None:
            raise ValueError("the residuals of every prompt were not kept")
        return self.per_prompt


def mean_residuals(
    language_model: LanguageModel,
    name: str,
    sequences: Sequence[list[int]],
    batcher: Batcher,
    winsorize: float = 1.0,
    *,
    keep_each: bool = False,
    keep: Callable[[Batch, Tensor], None] = lambda _batch, _residuals: None,
) -> ResidualMeans:
    """Mean over prompts of the residual at the last token, for every block; with `keep_each` those of every prompt too.

    Hooks take one vector a row and block; the logits are never computed. With `winsorize` < 1 the components of each vector
    are clipped to that quantile of their magnitudes. Sums are kept in float64, one batch's residuals at a time, so that
    memory does not grow with the number of prompts, unless each prompt's are kept: `bytes_of_each`. `keep` gets each batch with
    its residuals [rows, layers, width].
    """
    structure = language_model.structure
    total = torch.zeros(structure.num_layers, structure.width, dtype=torch.float64)
    each = torch.empty(len(sequences), structure.num_layers, structure.width) if keep_each else None

    def step(batch: Batch) -> list[None]:
        residuals = last_token_residuals(language_model, batch)
        if winsorize < 1.0:
            limit = torch.quantile(residuals.abs(), winsorize, dim=-1, keepdim=True)
            residuals = residuals.clamp(-limit, limit)
        keep(batch, residuals)
        total.add_(residuals.double().sum(dim=0))
        if each is not None:
            each[batch.rows] = residuals
        return [None] * len(batch.rows)

    batcher.run(name, sequences, step)
    return ResidualMeans(total / len(sequences), len(sequences), each)


def bytes_of_each(language_model: LanguageModel, prompts: int) -> int:
    """RAM that the residuals of so many prompts take, all layers in float32."""
    return 4 * prompts * language_model.structure.num_layers * language_model.structure.width


@torch.inference_mode()
def last_token_residuals(language_model: LanguageModel, batch: Batch) -> Tensor:
    """Residuals after every block at the last token, float32 [rows, layers, width] on the CPU."""
    blocks = language_model.structure.blocks
    found: list[Tensor | None] = [None] * len(blocks)
    shape = (*batch.input_ids.shape, language_model.structure.width)

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: object) -> None:
            found[layer] = one_stream(first_tensor(output), *shape)[:, -1, :].float().cpu()

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    try:
        hidden_states(language_model.model, batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    # A block that is passed over (cross-attention without an image) leaves the stream as it is.
    first = next(r for r in found if r is not None)
    stream = itertools.accumulate(found, lambda before, after: before if after is None else after, initial=first)
    return torch.stack(list(stream)[1:], dim=1)


def one_stream(hidden: Tensor, rows: int, tokens: int, width: int) -> Tensor:
    """Hidden states [rows, tokens, width]; of several streams side by side ([rows, tokens, streams, width] in DeepSeek V4, the
    streams first in Gemma 3n, [rows, tokens, streams x width] elsewhere) the mean, which is about what the head reads."""
    if hidden.shape[-1] != width:
        hidden = hidden.unflatten(-1, (-1, width))
    if hidden.ndim != 4:
        return hidden
    return hidden.mean(dim=2 if hidden.shape[:2] == (rows, tokens) else 0)
