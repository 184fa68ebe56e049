"""One pass of a batch through a model, with the arguments that this model takes."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from heretic.model.batching import Batch


@lru_cache(maxsize=64)
def accepted(model_class: Hashable) -> frozenset[str]:
    """Names of the arguments that a model's forward takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]


def run(model: Any, batch: Batch, **arguments: Any) -> Any:
    """The model's output for a batch; arguments that it does not know are left out (old models know no logits_to_keep)."""
    names = accepted(model.__class__)
    given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids, **arguments}
    return model(input_ids=batch.input_ids, **{k: v for k, v in given.items() if k in names})


@torch.inference_mode()
def next_token_log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probabilities of the token that follows each row, float32 [rows, vocabulary]."""
    logits = run(model, batch, use_cache=False, logits_to_keep=1).logits[:, -1, :]
    return torch.log_softmax(logits.float(), dim=-1)
