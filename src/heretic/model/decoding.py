"""Greedy decoding in which a row leaves the batch as soon as it has ended, and texts that are likely are tried first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from heretic.errors import UserError, first_line
from heretic.model.batching import Batch
from heretic.model.device_errors import is_device_error
from heretic.model.forward import (
    forward_supported,
    hidden_states,
    log_probs_of,
    rows_of_trials,
    rows_selectable,
    supported_arguments,
)

# Cache rows are copied when rows leave; worth it once a quarter of them has.
COMPACT_BELOW = 0.75
# Tokens between two looks at what has been decoded: a look makes a GPU wait for the host, and costs nothing elsewhere.
SYNC_INTERVAL = {"cpu": 1}
OTHERWISE = 4

Ended = Callable[[int, list[int]], bool]  # (row of the batch, its tokens so far): nothing more is wanted of it


@dataclass
class DecodingState:
    """Answers under way: `tokens` by row of the batch, which rows are still open, and what going on with them needs.

    `likely` are the probabilities of the tokens that were tried, by row, and `matching` whether each of them was the most
    probable one. Cache row i belongs to batch row
    `alive[i]`, `mask` [alive, slots] marks the slots of the cache that count, `positions` [alive, 1] are those of the
    tokens that come next. Without a cache that can be used, `cache` is None.
    """

    tokens: list[list[int]]
    open_rows: set[int]
    likely: list[list[float]]
    matching: list[bool]
    cache_rows: list[int]
    mask: Tensor
    positions: Tensor
    cache: Any
    trials: Tensor | None


@dataclass(frozen=True)
class StopCriteria:
    """When an answer ends: after `max_tokens`, at one of `end_tokens` (which is not part of it), or when `ended` says so."""

    max_tokens: int
    end_tokens: set[int]
    ended: Ended | None = None

    def append_tokens(self, answers: DecodingState, row: int, token: int) -> None:
        """One more token for a row that is open."""
        if token in self.end_tokens:
            answers.open_rows.discard(row)
            return
        answers.tokens[row].append(token)
        if (self.ended and self.ended(row, answers.tokens[row])) or len(answers.tokens[row]) >= self.max_tokens:
            answers.open_rows.discard(row)


@torch.inference_mode()
def verify_draft(model: Any, batch: Batch, tried: Sequence[Sequence[int]], limits: StopCriteria) -> DecodingState:
    """Begin an answer for every row of a batch whose sequences end with the tokens to be tried (none: `[]`).

    One pass gives the most probable token after the prompt and after every tried token. As long as the two agree, the tried
    text is the greedy answer; where they part, the answer goes on with the most probable token. So the tokens are those
    that decoding one by one gives, and nothing is guessed.
    """
    hidden, cache = hidden_states(model, batch, use_cache=True)
    length = hidden.shape[1]
    # All places whose next token matters: the prompt's last, and each tried token but the last.
    places = [(row, i) for row, text in enumerate(tried) for i in range(max(1, len(text)))]
    picked = torch.tensor([(row, length - len(tried[row]) - 1 + i) for row, i in places], device=hidden.device)
    wanted = torch.tensor([tried[row][i] if tried[row] else 0 for row, i in places], device=hidden.device)
    best, chance = _most_probable(model, hidden[picked[:, 0], picked[:, 1]], wanted)
    rows = range(len(batch.rows))
    answers = DecodingState(
        tokens=[[] for _ in rows],
        open_rows=set(rows),
        likely=[[] for _ in rows],
        matching=[bool(text) for text in tried],
        cache_rows=list(rows),
        mask=batch.attention_mask.clone(),
        positions=batch.position_ids[:, -1:].clone(),  # of the last token, until they are put right below
        cache=cache,
        trials=batch.trial_of_row,
    )
    parted: set[int] = set()
    for (row, i), token, p in zip(places, best, chance, strict=True):
        if tried[row]:
            answers.likely[row].append(p)
            answers.matching[row] &= token == tried[row][i]
        if row in answers.open_rows and row not in parted:
            limits.append_tokens(answers, row, token)
            if not tried[row] or token != tried[row][i]:
                parted.add(row)
    whole = [
        row for row in answers.open_rows if row not in parted
    ]  # all tried tokens were right, and the answer goes on
    if whole:
        best, _ = _most_probable(
            model, hidden[whole, -1], torch.zeros(len(whole), dtype=torch.long, device=hidden.device)
        )
        for row, token in zip(whole, best, strict=True):
            limits.append_tokens(answers, row, token)
    for row, text in enumerate(tried):
        agreed = max(0, len(answers.tokens[row]) - 1)  # the last token is not in the cache yet
        if agreed < len(text):
            answers.mask[row, answers.mask.shape[1] - len(text) + agreed :] = 0
        answers.positions[row] += agreed - len(text) + 1
    if not rows_selectable(cache) and any(tried):
        answers.cache = None  # states that have seen a wrong token cannot forget it
    return answers


def _most_probable(model: Any, hidden: Tensor, wanted: Tensor) -> tuple[list[int], list[float]]:
    """For hidden states [rows, width]: the most probable next token, and the probability of the wanted one [rows]."""
    best, chance = [], []
    for rows, log_probs in log_probs_of(model, hidden):
        best.append(log_probs.argmax(dim=-1))
        chance.append(log_probs.gather(1, wanted[rows, None]).exp()[:, 0].nan_to_num(0.0))  # of a destroyed model: none
    return torch.cat(best).tolist(), torch.cat(chance).tolist()


@torch.inference_mode()
def continue_decoding(model: Any, answers: DecodingState, limits: StopCriteria) -> None:
    """Decode until every row has ended; `answers.tokens` are then complete."""
    between = SYNC_INTERVAL.get(answers.mask.device.type, OTHERWISE)
    tokens = torch.tensor([answers.tokens[row][-1:] or [0] for row in answers.cache_rows], device=answers.mask.device)
    while answers.open_rows:
        if len(answers.open_rows) <= COMPACT_BELOW * len(answers.cache_rows) and rows_selectable(answers.cache):
            tokens = tokens[_keep_rows(answers).to(tokens.device)]
        found = []
        for _ in range(min(between, limits.max_tokens - min(len(answers.tokens[row]) for row in answers.open_rows))):
            answers.mask = torch.cat([answers.mask, answers.mask.new_ones(len(answers.mask), 1)], dim=1)
            with rows_of_trials(answers.trials):
                output = forward_supported(
                    model,
                    tokens,
                    attention_mask=answers.mask,
                    position_ids=answers.positions,
                    past_key_values=answers.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            answers.cache = output.past_key_values
            answers.positions = answers.positions + 1
            tokens = output.logits[:, -1, :].argmax(dim=-1, keepdim=True)
            found.append(tokens)
        for row, following in zip(answers.cache_rows, torch.cat(found, dim=1).tolist(), strict=True):
            for token in following:
                if row in answers.open_rows:
                    limits.append_tokens(answers, row, token)


def _keep_rows(answers: DecodingState) -> Tensor:
    """Take the rows that have ended out of the cache; returns the places of the others."""
    # On the CPU: the layers of a model that is spread over devices have their keys on as many devices.
    keep = torch.tensor([i for i, row in enumerate(answers.cache_rows) if row in answers.open_rows])
    answers.cache.batch_select_indices(keep)
    there = keep.to(answers.mask.device)
    answers.mask, answers.positions = answers.mask[there], answers.positions[there]
    if answers.trials is not None:
        answers.trials = answers.trials[there]
    answers.cache_rows = [answers.cache_rows[i] for i in keep.tolist()]
    return keep


def decode(
    model: Any, batch: Batch, max_tokens: int, end_tokens: set[int], ended: Ended | None = None
) -> list[list[int]]:
    """The most probable continuation of every row, at most `max_tokens` tokens, without the end token.

    A row ends at an end token or as soon as `ended(row, tokens so far)` is true. Plain argmax: penalties that a model's
    generation config may ask for are not applied, so that the outcome depends on the model alone.
    """
    if not has_cache(model):
        return _generate(model, batch, max_tokens, end_tokens)
    limits = StopCriteria(max_tokens, end_tokens, ended)
    answers = verify_draft(model, batch, [[]] * len(batch.rows), limits)
    if answers.cache is None:  # kept within the layers (RecurrentGemma)
        return _generate(model, batch, max_tokens, end_tokens)
    continue_decoding(model, answers, limits)
    return answers.tokens


def has_cache(model: Any) -> bool:
    """Whether the model can be given a cache; others are decoded by transformers' generate, without ending rows early."""
    return "past_key_values" in supported_arguments(model.__class__)


@torch.inference_mode()
def decoded_by_generate(model: Any, device: torch.device | str) -> bool:
    """Whether answers are left to transformers' generate, told by a pass over one token."""
    if not has_cache(model):
        return True
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    return getattr(forward_supported(model, token, use_cache=True), "past_key_values", None) is None


@torch.inference_mode()
def _generate(model: Any, batch: Batch, max_tokens: int, end_tokens: set[int]) -> list[list[int]]:
    """For models with another kind of memory than a key-value cache."""
    ends = sorted(end_tokens)
    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if ends else 0
    )
    try:
        with rows_of_trials(batch.trial_of_row):
            output = model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # of the model's own code
        if is_device_error(error):
            raise
        raise UserError(
            f"Transformers cannot generate with {type(model).__name__}: {first_line(error)}",
            code="architecture-not-supported",
            fix="see docs/architectures.md for the architectures that work",
        ) from error
    answers = output[:, batch.input_ids.shape[1] :].tolist()
    return [a[: next((i for i, t in enumerate(a) if t in end_tokens), len(a))] for a in answers]
