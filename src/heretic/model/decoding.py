"""Greedy decoding in which a row leaves the batch as soon as it has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from heretic.model.batching import Batch
from heretic.model.forward import accepted, run

# Cache rows are copied when rows leave; worth it once a quarter of them has.
COMPACT_BELOW = 0.75


@torch.inference_mode()
def decode(
    model: Any,
    batch: Batch,
    max_tokens: int,
    end_tokens: set[int],
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The most probable continuation of every row, at most `max_tokens` tokens, without the end token.

    A row ends at an end token or as soon as `ended(tokens so far)` is true. Plain argmax: penalties that a model's generation
    config may ask for are not applied, so that the outcome depends on the model alone.
    """
    if "past_key_values" not in accepted(model.__class__):
        return _generate(model, batch, max_tokens, end_tokens)
    answers: list[list[int]] = [[] for _ in batch.rows]
    alive = list(range(len(batch.rows)))  # answers[alive[i]] belongs to row i of the cache, or to none if it ended
    open_rows = set(alive)
    mask, positions = batch.attention_mask, batch.position_ids[:, -1:]
    output = run(model, batch, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    for step in range(max_tokens):
        tokens = output.logits[:, -1, :].argmax(dim=-1)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            if row not in open_rows:
                continue
            if token in end_tokens:
                open_rows.discard(row)
                continue
            answers[row].append(token)
            if ended is not None and ended(answers[row]):
                open_rows.discard(row)
        if not open_rows or step == max_tokens - 1:
            break
        if len(open_rows) <= COMPACT_BELOW * len(alive) and can_be_cut(cache):
            # On the CPU: the layers of a model that is spread over devices have their keys on as many devices.
            keep = torch.tensor([i for i, row in enumerate(alive) if row in open_rows])
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            alive = [row for row in alive if row in open_rows]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions + 1
        output = _next(model, tokens, mask, positions, cache)
        cache = output.past_key_values
    return answers


def can_be_cut(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: true for plain keys and values, not for recurrent or convolution states."""
    layers = getattr(cache, "layers", None) or [None]
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _next(model: Any, tokens: Tensor, mask: Tensor, positions: Tensor, cache: object) -> Any:
    names = accepted(model.__class__)
    given = {
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    return model(input_ids=tokens[:, None], **{k: v for k, v in given.items() if k in names})


def _generate(model: Any, batch: Batch, max_tokens: int, end_tokens: set[int]) -> list[list[int]]:
    """For models with another kind of memory than a key-value cache."""
    ends = sorted(end_tokens)
    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if ends else 0
    )
    output = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config)
    answers = output[:, batch.input_ids.shape[1] :].tolist()
    return [a[: next((i for i, t in enumerate(a) if t in end_tokens), len(a))] for a in answers]
