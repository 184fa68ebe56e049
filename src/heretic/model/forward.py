"""One pass of a batch through a model, with the arguments that this model takes, and what all prompts begin with run once."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from heretic.model.batching import Batch, Batcher, Beginning, shared_tokens

log = logging.getLogger(__name__)

# Largest KL between the two ways of computing the same answer; float32 gives 1e-9, bfloat16 up to 1e-4.
SAME = {torch.float32: 1e-6, torch.float64: 1e-6}
SAME_IN_HALF_PRECISION = 1e-3


@lru_cache(maxsize=64)
def accepted(model_class: Hashable) -> frozenset[str]:
    """Names of the arguments that a model's forward takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]


def run(model: Any, batch: Batch, **arguments: Any) -> Any:
    """The model's output for a batch; arguments that it does not know are left out (old models know no logits_to_keep)."""
    given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids, **arguments}
    if batch.beginning is not None:
        given["past_key_values"] = _cache(model, batch.beginning, batch)
        given["use_cache"] = True
    names = accepted(model.__class__)
    return model(input_ids=batch.input_ids, **{k: v for k, v in given.items() if k in names})


def _cache(model: Any, beginning: Beginning, batch: Batch) -> Any:
    """The cache of the beginning for every row; computed with the first batch."""
    if beginning.cache is None:
        tokens = torch.tensor([beginning.tokens], device=batch.input_ids.device)
        alone = Batch([0], tokens, torch.ones_like(tokens))
        beginning.cache = run(model, alone, use_cache=True, logits_to_keep=1).past_key_values
    cache = copy.deepcopy(beginning.cache)
    cache.batch_repeat_interleave(len(batch.rows))
    return cache


@torch.inference_mode()
def next_token_log_probs(model: Any, batch: Batch) -> Tensor:
    """Log-probabilities of the token that follows each row, float32 [rows, vocabulary]."""
    logits = run(model, batch, use_cache=False, logits_to_keep=1).logits[:, -1, :]
    return torch.log_softmax(logits.float(), dim=-1)


def can_share(model: Any, sequences: Sequence[list[int]], batcher: Batcher) -> bool:
    """Whether running the shared beginning once gives what plain passes give, tried on a few prompts of unequal length.

    It does not for models whose cache cannot be repeated, or whose attention counts the padding between the beginning and
    the rest (a window shorter than the prompts). The reason is logged.
    """
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    few = [sequences[i] for i in dict.fromkeys((by_length[0], by_length[len(by_length) // 2], by_length[-1]))]
    shared = shared_tokens(sequences)
    rows = list(range(len(few)))
    try:
        plain = next_token_log_probs(model, batcher.batch(rows, few))
        once = next_token_log_probs(model, batcher.batch(rows, few, Beginning(shared)))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
        log.info("shared beginnings are run for every prompt: %r", error)
        return False
    apart = float((plain.exp() * (plain - once)).sum(-1).abs().max())
    if not apart <= SAME.get(model.dtype, SAME_IN_HALF_PRECISION):
        log.info("shared beginnings are run for every prompt: running them once changes the answers by KL %.1e", apart)
        return False
    return True
