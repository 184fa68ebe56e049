"""Capture residuals: the residual stream after every block at a prompt's last token."""

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
from heretic.model.patching import forward_hooks
from heretic.model.transfer import HostCopies
from heretic.model.turns import Turns


@dataclass(frozen=True)
class ResidualMeans:
    """Mean residual after every block, over `count` prompts."""

    mean: Tensor  # [layers, width], float64
    count: int
    per_prompt: Tensor | None = None  # [prompts, layers, width], float32 on the CPU, if requested

    @property
    def require_per_prompt(self) -> Tensor:
        """Return `per_prompt`. Raises ValueError if it was not recorded."""
        if self.per_prompt is None:
            raise ValueError("the residuals of single prompts were not recorded")
        return self.per_prompt


@dataclass
class ResidualSums:
    """Adds up residuals of prompts, of any rows and layers at a time, in float64.

    Args:
        prompts: Their number.
        layers: Number of blocks.
        width: Of the residual stream.
        winsorize: Below 1, clip each vector's components to this quantile of their magnitudes.
        keep_each: Keep the residuals of every prompt too, in float32.
    """

    prompts: int
    layers: int
    width: int
    winsorize: float = 1.0
    keep_each: bool = False

    def __post_init__(self) -> None:
        self._total = torch.zeros(self.layers, self.width, dtype=torch.float64)
        self._each = torch.empty(self.prompts, self.layers, self.width) if self.keep_each else None

    def add(self, rows: Sequence[int], residuals: Tensor, first: int = 0) -> Tensor:
        """Add residuals [rows, layers, width] of the layers from `first` on; returns them as they count."""
        layers = slice(first, first + residuals.shape[1])
        if self.winsorize < 1.0:
            limit = torch.quantile(residuals.abs(), self.winsorize, dim=-1, keepdim=True)
            residuals = residuals.clamp(-limit, limit)
        self._total[layers] += residuals.double().sum(dim=0)
        if self._each is not None:
            self._each[list(rows), layers] = residuals
        return residuals

    @property
    def means(self) -> ResidualMeans:
        """The means, after all residuals were added."""
        return ResidualMeans(self._total / self.prompts, self.prompts, self._each)


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
    """Compute the mean residual at the last token over prompts, for every block. Sums are in float64.

    Args:
        language_model: The loaded model; its logits are not computed.
        name: Of the stage on the screen.
        sequences: Token ids of every prompt.
        batcher: Runs the batches.
        winsorize: Below 1, clip each vector's components to this quantile of their magnitudes.
        keep_each: Return the residuals of every prompt too; they take `bytes_of_each` of RAM.
        keep: Called with each batch and its residuals [rows, layers, width].
    """
    structure = language_model.structure
    sums = ResidualSums(len(sequences), structure.num_layers, structure.width, winsorize, keep_each)

    def step(batch: Batch) -> Turns[list[None]]:
        residuals = yield from last_token_residuals(language_model, batch)
        keep(batch, sums.add(batch.rows, residuals))
        return [None] * len(batch.rows)

    batcher.run(name, sequences, step)
    return sums.means


def bytes_of_each(language_model: LanguageModel, prompts: int) -> int:
    """Return the bytes of RAM that the residuals of `prompts` prompts take, all layers in float32."""
    return 4 * prompts * language_model.structure.num_layers * language_model.structure.width


@torch.inference_mode()
def last_token_residuals(language_model: LanguageModel, batch: Batch) -> Turns[Tensor]:
    """Return the residuals after every block at the last token, float32 [rows, layers, width] on the CPU, after one turn."""
    blocks = language_model.structure.blocks
    residuals: list[Tensor | None] = [None] * len(blocks)
    copies = HostCopies()
    shape = (*batch.input_ids.shape, language_model.structure.width)

    def record(layer: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: object) -> None:
            last = one_stream(first_tensor(output), *shape)[:, -1, :]
            residuals[layer] = copies.copy(last.clone().float())  # a view would keep the states of all tokens

        return hook

    with forward_hooks((block, record(layer)) for layer, block in enumerate(blocks)):
        hidden_states(language_model.model, batch, use_cache=False)
    yield
    copies.wait()
    # A skipped block (cross-attention without an image) does not change the stream.
    first = next(r for r in residuals if r is not None)
    stream = itertools.accumulate(residuals, lambda before, after: before if after is None else after, initial=first)
    return torch.stack(list(stream)[1:], dim=1)


def one_stream(hidden: Tensor, rows: int, tokens: int, width: int) -> Tensor:
    """Return hidden states [rows, tokens, width]; of parallel streams the mean, which is about what the head reads.

    DeepSeek V4 has [rows, tokens, streams, width], Gemma 3n has the streams first, others have [rows, tokens, streams x width].
    """
    if hidden.shape[-1] != width:
        hidden = hidden.unflatten(-1, (-1, width))
    if hidden.ndim != 4:
        return hidden
    return hidden.mean(dim=2 if hidden.shape[:2] == (rows, tokens) else 0)
