"""Run one pass of a batch: a shared prefix only once, and without the blocks below the first edited one."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from heretic.model.activation_cache import ActivationCache
from heretic.model.batching import Batch, Batcher, EditSpec, SharedPrefix, shared_tokens
from heretic.model.device_errors import is_device_error
from heretic.model.kv_cache import rows_selectable, select_rows
from heretic.model.masks import known_padding
from heretic.model.patching import outputs_stay, replaced_forward
from heretic.model.probe import input_device
from heretic.model.transfer import Index, send_through_ram, to_device
from heretic.model.turns import Turns

log = logging.getLogger(__name__)

Launched = TypeVar("Launched")

# Largest KL between two computations of the same answer. Measured on Qwen2.5-Coder-0.5B: 6e-8 in float32, 1.6e-3 in bfloat16.
SAME = {torch.float32: 1e-6, torch.float64: 1e-6}
SAME_IN_HALF_PRECISION = 5e-3
PADDED_IN_HALF_PRECISION = 1e-2  # a router may choose another expert for a token when a batch has another shape
# What a model's own code raises where a pass does without something that it needs.
MODEL_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, NotImplementedError)
LOGIT_ROWS = 64  # rows whose logits over the vocabulary exist at a time

# Trial of each row of the current pass [rows]; the operators attached to the writers read it. None: all rows belong to one trial.
trial_of_row: ContextVar[Index | None] = ContextVar("trial_of_row", default=None)


@contextmanager
def rows_of_trials(trials: Index | None) -> Iterator[None]:
    """Assign the rows of every pass within the context to these trials."""
    token = trial_of_row.set(trials)
    try:
        yield
    finally:
        trial_of_row.reset(token)


@lru_cache(maxsize=64)
def supported_arguments(model_class: Hashable) -> frozenset[str]:
    """Return the names of the arguments of a model's forward."""
    return frozenset(inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]


def forward_supported(module: Any, input_ids: Tensor, **arguments: Any) -> Any:
    """Run the module without arguments that it does not know (old models lack logits_to_keep)."""
    names = supported_arguments(module.__class__)
    return module(input_ids=input_ids, **{k: v for k, v in arguments.items() if k in names and v is not None})


@torch.inference_mode()
def hidden_states(model: Any, batch: Batch, *, use_cache: bool) -> tuple[Tensor, Any]:
    """Run the decoder without its head.

    Returns:
        The head's input for every token after the shared prefix [rows, tokens, width], and the cache of the pass, if any.
    """
    return run_decoder(model, batch, use_cache=use_cache)


def run_decoder(model: Any, batch: Batch, *, use_cache: bool) -> tuple[Tensor, Any]:
    """Run the decoder as `hidden_states` does, with gradients if they are enabled."""
    cache = _cache(model, batch.shared_prefix, batch) if batch.shared_prefix else None
    activations, first_edited = batch.activation_cache, batch.edited.first_layer
    recording = activations.resume_and_record(batch.rows, first_edited) if activations else nullcontext()
    trials = None if batch.trials is None else Index(batch.trials)
    with rows_of_trials(trials), known_padding(batch.padded), recording as recorded:
        output = forward_supported(
            decoder_of(model),
            batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
        )
    cache = getattr(output, "past_key_values", None)
    if activations and recorded:
        activations.update_kv_cache(cache if use_cache else None, recorded)
    return output.last_hidden_state, cache


def decoder_of(model: Any) -> Any:
    """Return the module that gives hidden states; `get_decoder` includes the head in some families."""
    decoder = model.get_decoder()
    if "input_ids" not in supported_arguments(decoder.__class__):
        return model.base_model
    if not hasattr(decoder, "lm_head"):
        return decoder
    return decoder.model if decoder.base_model is decoder else decoder.base_model


def _cache(model: Any, prefix: SharedPrefix, batch: Batch) -> Any:
    """The prefix cache for every row; computed with the first batch, once a trial."""
    if prefix.cache is None:
        trials = range(batch.edited.trials)
        tokens = to_device([prefix.tokens] * len(trials), batch.input_ids.device)
        prefix_trials = None if batch.trials is None else list(trials)
        cached = batch.activation_cache.beginning if batch.activation_cache else None
        prefix_batch = Batch(
            rows=[0] * len(trials),
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            trials=prefix_trials,
            edited=batch.edited,
            activation_cache=cached,
            padded_rows=[False] * len(trials),
        )
        _, prefix.cache = run_decoder(model, prefix_batch, use_cache=True)
    if not rows_selectable(prefix.cache):
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(batch.rows))
        return cache
    cache = copy.copy(prefix.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]  # selecting replaces tensors in the copies only
    select_rows(cache, batch.trials or [0] * len(batch.rows))
    return cache


class _HiddenStatesOutput(BaseModelOutputWithPast):
    """A decoder output that holds hidden states; all its other attributes are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Compute the logits [rows, vocabulary] for hidden states [rows, width], by the model's own forward.

    They stay on the device of the head.
    """
    # Contiguous: of a strided slice, PyTorch's CPU kernel takes 70 times as long in bfloat16, and 1.5 times in float32.
    output = _HiddenStatesOutput(last_hidden_state=hidden.contiguous()[:, None])
    # On the device of the inputs: accelerate would copy them there, and such a copy waits for both devices.
    tokens = torch.zeros(len(hidden), 1, dtype=torch.long, device=input_device(model))
    with replaced_forward(decoder_of(model), lambda *_, **__: output), outputs_stay(model):
        return forward_supported(model, tokens, use_cache=False).logits[:, -1]


def head_apart(model: Any) -> bool:
    """Return whether the head is on another GPU than the decoder's last weight, as with tied weights: beside the embedding."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    last = next(reversed(list(decoder_of(model).parameters())), None)
    placed = [each.device for each in (head, last) if isinstance(each, Tensor)]
    return len(placed) == 2 and placed[0] != placed[1] and "meta" not in {device.type for device in placed}


def bring_to_head(model: Any, hidden: Tensor) -> Turns[Tensor]:
    """Return hidden states on the device of the head: themselves if they are there, else a copy after a turn.

    The head's GPU has then begun other batches, and no batch waits there for the end of another one's pass.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    if not isinstance(head, Tensor) or head.device == hidden.device or head.device.type == "meta":
        return hidden
    arrive = send_through_ram(hidden, head.device)
    yield
    return arrive()


def launch_head(model: Any, hidden: Tensor, launch: Callable[[Tensor], Launched]) -> Turns[Launched]:
    """Launch the head's work on hidden states, with one turn: before it if the head is on another GPU, else after it."""
    at_head = yield from bring_to_head(model, hidden)
    launched = launch(at_head)
    if at_head is hidden:
        yield
    return launched


def log_probs_of(model: Any, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows with their log-probabilities [rows, vocabulary] in float32, for hidden states [rows, width]."""
    for start in range(0, len(hidden), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logits = logits_of(model, hidden[rows])
        yield rows, torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def fast_argmax(values: Tensor) -> Tensor:
    """Return the index of the largest value of each row [rows], the first of several."""
    return values.max(dim=-1).indices  # argmax takes 5 to 20 times as long in bfloat16 on CPUs


@torch.inference_mode()
def next_token_log_probs(model: Any, batch: Batch) -> Tensor:
    """Compute the log-probabilities of each row's next token, float32 [rows, vocabulary]."""
    hidden, _ = hidden_states(model, batch, use_cache=False)
    return torch.cat([log_probs for _, log_probs in log_probs_of(model, hidden[:, -1])])


def supports_prefix_caching(
    model: Any, sequences: Sequence[list[int]], batcher: Batcher, *, longest: int = 0, window: int = 1
) -> bool:
    """Return whether prefix caching gives the same answers as plain passes, by a test on prompts of different lengths.

    It fails for models whose cache cannot be repeated, or whose sliding window counts the padding after the prefix: the test is
    skipped if the `longest` prompt with its answer fills the `window` (in tokens). The reason is logged.
    """
    if longest >= window:
        log.info("prefix caching disabled: %d tokens fill the attention window of %d", longest, window)
        return False
    few, rows = probe_sequences(sequences)
    return matches_reference(
        "prefix caching disabled",
        model,
        lambda: batcher.batch(rows, few),
        lambda: batcher.batch(rows, few, SharedPrefix(shared_tokens(sequences))),
    )


def padding_sensitive(model: Any, sequences: Sequence[list[int]], batcher: Batcher) -> bool:
    """Return whether padding changes a prompt's answers, as in some recurrent and convolution layers, by a test."""
    few, rows = probe_sequences(sequences)
    batched = next_token_log_probs(model, batcher.batch(rows, few))
    single = torch.cat([next_token_log_probs(model, batcher.batch([row], few)) for row in rows])
    return not max_kl(single, batched) <= SAME.get(model.dtype, PADDED_IN_HALF_PRECISION)


def supports_mid_stack_start(model: Any, blocks: Any, sequences: Sequence[list[int]], batcher: Batcher) -> bool:
    """Return whether a pass can start at a later block, from cached activations, by a test on a few prompts."""
    few, rows = probe_sequences(sequences)
    shared = shared_tokens(sequences) if batcher.prefix_caching else []

    def works_from(first_edited: int) -> bool:
        prefix = ActivationCache(blocks, [shared], with_cache=True) if shared else None
        activations = ActivationCache(blocks, few, start=len(shared), with_cache=True, beginning=prefix)

        def batch() -> Batch:
            complete = batcher.batch(rows, few, SharedPrefix(shared) if shared else None, activations)
            return replace(complete, edited=EditSpec(first_layer=first_edited))

        def after_recording() -> Batch:
            hidden_states(model, batch(), use_cache=True)
            activations.store()
            return batch()

        reason = "activation cache disabled"
        same = matches_reference(reason, model, lambda: batcher.batch(rows, few), after_recording)
        return same and activations.resume_layer(rows, first_edited) > 0

    # Also at the last block: it may use the keys and values of one in the middle (Gemma 3n and 4).
    return works_from(len(blocks) // 2) and works_from(len(blocks) - 1)


def probe_sequences(sequences: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Select the shortest, the median and the longest sequence; returns them and their indices."""
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    few = [sequences[i] for i in dict.fromkeys((by_length[0], by_length[len(by_length) // 2], by_length[-1]))]
    return few, list(range(len(few)))


def matches_reference(disabled: str, model: Any, reference_batch: Any, cheap_batch: Any) -> bool:
    """Return whether two batches give the same answers; logs `disabled` with the reason if not.

    Args:
        disabled: What is disabled if they differ.
        model: The model.
        reference_batch: Builds the reference batch.
        cheap_batch: Builds the batch with less compute.
    """
    try:
        reference = next_token_log_probs(model, reference_batch())
        cheap = next_token_log_probs(model, cheap_batch())
    except MODEL_ERRORS as error:
        if is_device_error(error):
            raise
        log.info("%s: %s", disabled, repr(error))  # the error would hold the pass's tensors
        return False
    kl = max_kl(reference, cheap)
    if not kl <= kl_tolerance(model):
        log.info("%s: it changes the answers by KL %.1e", disabled, kl)
        return False
    return True


def max_kl(reference: Tensor, other: Tensor) -> float:
    """Return the largest KL between two computations of the same answers, given as log-probabilities."""
    return float((reference.exp() * (reference - other)).sum(-1).abs().max())


def kl_tolerance(model: Any) -> float:
    """Return the largest KL that rounding explains in the model's number format."""
    return SAME.get(model.dtype, SAME_IN_HALF_PRECISION)
