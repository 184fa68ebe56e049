"""Attention masks without the question whether a batch is padded, for which transformers waits for the GPU at every pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import Tensor
from transformers import masking_utils

# Whether any row of the current pass is padded; None: transformers looks.
_padded: ContextVar[bool | None] = ContextVar("padded", default=None)


@contextmanager
def known_padding(padded: bool | None) -> Iterator[None]:
    """Tell transformers within the context whether the passes' masks have zeros. The masks stay the same.

    This holds for scaled-dot-product attention of all models that build their masks with transformers.masking_utils; the others
    build them as before.
    """
    _answer_for_transformers()
    token = _padded.set(padded)
    try:
        yield
    finally:
        _padded.reset(token)


@cache
def _answer_for_transformers() -> None:
    """Replace the mask function of scaled-dot-product attention by one that does not look where the answer is known."""
    masks: Any = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    looking = masks["sdpa"]

    def build(
        *args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
    ) -> Tensor | None:
        padded = _padded.get()
        if padded is not None:  # a mask of ones counts as none, so that attention may run without a mask
            attention_mask = attention_mask if padded else None
            allow_is_causal_skip = allow_is_causal_skip and not padded
        built: Tensor | None = looking(
            *args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs
        )
        return built

    masks["sdpa"] = build
