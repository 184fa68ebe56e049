"""One pass of a batch through a model: what all prompts begin with once, blocks that no trial edits not at all."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from heretic.model.activation_cache import ActivationCache
from heretic.model.batching import Batch, Batcher, EditSpec, SharedPrefix, shared_tokens
from heretic.model.device_errors import is_device_error
from heretic.model.patching import replaced_forward

log = logging.getLogger(__name__)

# Largest KL between the two ways of computing the same answer; float32 gives 1e-9, bfloat16 up to 1e-4.
SAME = {torch.float32: 1e-6, torch.float64: 1e-6}
SAME_IN_HALF_PRECISION = 1e-3
PADDED_IN_HALF_PRECISION = 1e-2  # a router may choose another expert for a token when a batch has another shape
LOGIT_ROWS = 64  # rows whose logits over the vocabulary exist at a time

# To which trial each row of the pass that is under way belongs [rows]; the operators attached to the writers look here.
trial_of_row: ContextVar[Tensor | None] = ContextVar("trial_of_row", default=None)


@contextmanager
def rows_of_trials(trials: Tensor | None) -> Iterator[None]:
    """Within the context the rows of every pass belong to these trials."""
    token = trial_of_row.set(trials)
    try:
        yield
    finally:
        trial_of_row.reset(token)


@lru_cache(maxsize=64)
def supported_arguments(model_class: Hashable) -> frozenset[str]:
    """Names of the arguments that a model's forward takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]


def forward_supported(module: Any, input_ids: Tensor, **arguments: Any) -> Any:
    """The module's output; arguments that it does not know are left out (old models know no logits_to_keep)."""
    names = supported_arguments(module.__class__)
    return module(input_ids=input_ids, **{k: v for k, v in arguments.items() if k in names and v is not None})


@torch.inference_mode()
def hidden_states(model: Any, batch: Batch, *, use_cache: bool) -> tuple[Tensor, Any]:
    """What the head is given for every token [rows, tokens, width], and the cache of the pass (None without).

    The tokens of a shared beginning are not among them. The decoder is run without its head.
    """
    return run_decoder(model, batch, use_cache=use_cache)


def run_decoder(model: Any, batch: Batch, *, use_cache: bool) -> tuple[Tensor, Any]:
    """`hidden_states`, with gradients where the caller wants them."""
    cache = _cache(model, batch.shared_prefix, batch) if batch.shared_prefix else None
    entries, first = batch.activation_cache, batch.edited.first_layer
    passing = entries.resume_and_record(batch.rows, first, batch.input_ids.device) if entries else nullcontext(0)
    with rows_of_trials(batch.trial_of_row), passing as begins:
        output = forward_supported(
            decoder_of(model),
            batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
        )
    cache = getattr(output, "past_key_values", None)
    if entries:
        entries.update_kv_cache(cache if use_cache else None, batch.rows, begins, first)
    return output.last_hidden_state, cache


def decoder_of(model: Any) -> Any:
    """The part of a model that gives hidden states; transformers' own answer has the head on it in some families."""
    decoder = model.get_decoder()
    if "input_ids" not in supported_arguments(decoder.__class__):
        return model.base_model
    if not hasattr(decoder, "lm_head"):
        return decoder
    return decoder.model if decoder.base_model is decoder else decoder.base_model


def _cache(model: Any, beginning: SharedPrefix, batch: Batch) -> Any:
    """The cache of the beginning for every row; computed with the first batch, once for every trial."""
    if beginning.cache is None:
        trials = range(batch.edited.trials)
        tokens = torch.tensor([beginning.tokens] * len(trials), device=batch.input_ids.device)
        of_row = None if batch.trial_of_row is None else torch.tensor(list(trials), device=tokens.device)
        kept = batch.activation_cache.beginning if batch.activation_cache else None
        alone = Batch([0] * len(trials), tokens, torch.ones_like(tokens), None, of_row, batch.edited, kept)
        _, beginning.cache = run_decoder(model, alone, use_cache=True)
    if not rows_selectable(beginning.cache):
        cache = copy.deepcopy(beginning.cache)
        cache.batch_repeat_interleave(len(batch.rows))
        return cache
    cache = copy.copy(beginning.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]  # selecting puts new tensors into the copies
    trial = torch.zeros(len(batch.rows), dtype=torch.long) if batch.trial_of_row is None else batch.trial_of_row.cpu()
    cache.batch_select_indices(trial)
    return cache


def rows_selectable(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: true for plain keys and values, not for recurrent or convolution states."""
    layers = getattr(cache, "layers", None) or [None]
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class _GivenHidden(BaseModelOutputWithPast):
    """Hidden states in place of a decoder's output; whatever else a model looks for in it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """The model's logits [rows, vocabulary] for hidden states [rows, width], by its own forward around its decoder."""
    given = _GivenHidden(last_hidden_state=hidden[:, None])
    tokens = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
    with replaced_forward(decoder_of(model), lambda *_, **__: given):
        return forward_supported(model, tokens, use_cache=False).logits[:, -1]


def log_probs_of(model: Any, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Log-probabilities over the vocabulary for hidden states [rows, width], float32, some rows at a time."""
    for start in range(0, len(hidden), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logits = logits_of(model, hidden[rows])
        yield rows, torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


@torch.inference_mode()
def next_token_log_probs(model: Any, batch: Batch) -> Tensor:
    """Log-probabilities of the token that follows each row, float32 [rows, vocabulary]."""
    hidden, _ = hidden_states(model, batch, use_cache=False)
    return torch.cat([found for _, found in log_probs_of(model, hidden[:, -1])])


def supports_prefix_caching(
    model: Any, sequences: Sequence[list[int]], batcher: Batcher, *, longest: int = 0, window: int = 1
) -> bool:
    """Whether running the shared beginning once gives what plain passes give, tried on a few prompts of unequal length.

    It does not for models whose cache cannot be repeated, or whose attention counts the padding between the beginning and
    the rest: so not tried where the `longest` prompt with its answer fills the `window`. The reason is logged.
    """
    if longest >= window:
        log.info("shared beginnings are run for every prompt: %d tokens fill the window of %d", longest, window)
        return False
    few, rows = probe_sequences(sequences)
    return matches_reference(
        "shared beginnings are run for every prompt",
        model,
        lambda: batcher.batch(rows, few),
        lambda: batcher.batch(rows, few, SharedPrefix(shared_tokens(sequences))),
    )


def padding_sensitive(model: Any, sequences: Sequence[list[int]], batcher: Batcher) -> bool:
    """Whether a prompt beside longer ones gives something else than alone: some recurrent and convolution layers see the
    padding. Tried on a few prompts of unequal length."""
    few, rows = probe_sequences(sequences)
    together = next_token_log_probs(model, batcher.batch(rows, few))
    alone = torch.cat([next_token_log_probs(model, batcher.batch([row], few)) for row in rows])
    return not max_kl(alone, together) <= SAME.get(model.dtype, PADDED_IN_HALF_PRECISION)


def supports_mid_stack_start(model: Any, blocks: Any, sequences: Sequence[list[int]], batcher: Batcher) -> bool:
    """Whether a pass may begin at a later block, from what the original's blocks gave before; tried like `can_share`."""
    few, rows = probe_sequences(sequences)
    shared = shared_tokens(sequences) if batcher.prefix_caching else []

    def begins_at(first_edited: int) -> bool:
        beginning = ActivationCache(blocks, [shared], with_cache=True) if shared else None
        entries = ActivationCache(blocks, few, start=len(shared), with_cache=True, beginning=beginning)

        def batch() -> Batch:
            whole = batcher.batch(rows, few, SharedPrefix(shared) if shared else None, entries)
            return replace(whole, edited=EditSpec(first_layer=first_edited))

        def kept_first() -> Batch:
            hidden_states(model, batch(), use_cache=True)
            return batch()

        reason = "every pass begins with the first block"
        same = matches_reference(reason, model, lambda: batcher.batch(rows, few), kept_first)
        return same and entries.resume_layer(rows, first_edited) > 0

    # Late too: a late block may use the keys and values of one in the middle (Gemma 3n and 4).
    return begins_at(len(blocks) // 2) and begins_at(len(blocks) - 1)


def probe_sequences(sequences: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    few = [sequences[i] for i in dict.fromkeys((by_length[0], by_length[len(by_length) // 2], by_length[-1]))]
    return few, list(range(len(few)))


def matches_reference(otherwise: str, model: Any, plainly: Any, cheaply: Any) -> bool:
    try:
        plain = next_token_log_probs(model, plainly())
        cheap = next_token_log_probs(model, cheaply())
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
        if is_device_error(error):
            raise
        log.info("%s: %s", otherwise, repr(error))  # the error itself would keep the pass's tensors
        return False
    apart = max_kl(plain, cheap)
    if not apart <= kl_tolerance(model):
        log.info("%s: the cheaper way changes the answers by KL %.1e", otherwise, apart)
        return False
    return True


def max_kl(one: Tensor, other: Tensor) -> float:
    """The largest KL between two ways of computing the same answers."""
    return float((one.exp() * (one - other)).sum(-1).abs().max())


def kl_tolerance(model: Any) -> float:
    return SAME.get(model.dtype, SAME_IN_HALF_PRECISION)
