"""Residuals: what the stream holds after every block at a prompt's last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.model.anatomy import first_tensor
from heretic.model.batching import Batch, Batcher
from heretic.model.forward import hidden_states
from heretic.model.loading import LanguageModel


@dataclass(frozen=True)
class ResidualMeans:
    """Mean residual after every block [layers, width] in float64, over `count` prompts."""

    mean: Tensor
    count: int


def mean_residuals(
    language_model: LanguageModel, name: str, sequences: Sequence[list[int]], batcher: Batcher, winsorize: float = 1.0
) -> ResidualMeans:
    """Mean over prompts of the residual at the last token, for every block.

    Hooks take one vector a row and block; the logits are never computed. With `winsorize` < 1 the components of each vector
    are clipped to that quantile of their magnitudes. Sums are kept in float64, one batch's residuals at a time, so that
    memory does not grow with the number of prompts.
    """
    anatomy = language_model.anatomy
    total = torch.zeros(anatomy.num_layers, anatomy.width, dtype=torch.float64)

    def step(batch: Batch) -> list[None]:
        residuals = last_token_residuals(language_model, batch)
        if winsorize < 1.0:
            limit = torch.quantile(residuals.abs(), winsorize, dim=-1, keepdim=True)
            residuals = residuals.clamp(-limit, limit)
        total.add_(residuals.double().sum(dim=0))
        return [None] * len(batch.rows)

    batcher.run(name, sequences, step)
    return ResidualMeans(total / len(sequences), len(sequences))


@torch.inference_mode()
def last_token_residuals(language_model: LanguageModel, batch: Batch) -> Tensor:
    """Residuals after every block at the last token, float32 [rows, layers, width] on the CPU."""
    blocks = language_model.anatomy.blocks
    found: list[Tensor | None] = [None] * len(blocks)

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: object) -> None:
            found[layer] = first_tensor(output)[:, -1, :].float().cpu()

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    try:
        hidden_states(language_model.model, batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([r for r in found if r is not None], dim=1)
