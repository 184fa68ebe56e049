"""Greedy decoding with drafts verified in one pass (speculative decoding) and finished rows removed from the batch.

Batches take turns (`model.turns`), a token each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from heretic.errors import UserError, first_line
from heretic.model.batching import Batch
from heretic.model.decoding_graph import DecodingGraph, DecodingGraphs
from heretic.model.device_errors import is_device_error
from heretic.model.forward import (
    decoder_of,
    fast_argmax,
    forward_supported,
    head_apart,
    hidden_states,
    launch_head,
    log_probs_of,
    logits_of,
    rows_of_trials,
    supported_arguments,
)
from heretic.model.kv_cache import make_room, rows_selectable, select_rows
from heretic.model.masks import known_padding
from heretic.model.patching import outputs_stay
from heretic.model.transfer import HostCopies, Index, send_through_ram, to_device
from heretic.model.turns import Turns

if TYPE_CHECKING:
    from heretic.model.loading import LanguageModel

# Removing rows copies the cache; worth it once a quarter has ended.
COMPACT_BELOW = 0.75
COMPACT_WITH_GRAPHS = 0.5  # the next token is launched without a graph, and another one is captured
# Tokens between two host synchronizations, by device type: they stall a GPU, and cost nothing on the CPU. An answer that has ended
# is decoded until the next one.
SYNC_INTERVAL = {"cpu": 1}
DEFAULT_SYNC_INTERVAL = 12

Ended = Callable[[int, list[int]], bool]  # (row of the batch, its tokens so far) -> whether to end it


@dataclass
class DecodingState:
    """Unfinished answers of a batch, and the model state to continue them."""

    tokens: list[list[int]]  # by row of the batch
    open_rows: set[int]  # rows that have not ended
    likely: list[list[float]]  # by row: probability of each draft token
    matching: list[bool]  # by row: whether every draft token was the most probable one
    cache_rows: list[int]  # batch row of each cache row
    mask: Tensor  # [cache rows, slots]; 1 on the cache slots to attend to
    positions: Tensor  # [cache rows, 1] of the next tokens
    padded: list[bool] | None  # by row of the batch: whether its mask has zeros; None: not known without looking at it
    cache: Any  # None if the model's cache cannot be used
    trials: Index | None  # by cache row


@dataclass(frozen=True)
class StopCriteria:
    """When an answer ends: after `max_tokens`, before one of `end_tokens`, or when `ended` returns true."""

    max_tokens: int
    end_tokens: set[int]
    ended: Ended | None = None

    def append_tokens(self, answers: DecodingState, row: int, token: int) -> None:
        """Append a token to an open row, and close the row if it ends."""
        if token in self.end_tokens:
            answers.open_rows.discard(row)
            return
        answers.tokens[row].append(token)
        if (self.ended and self.ended(row, answers.tokens[row])) or len(answers.tokens[row]) >= self.max_tokens:
            answers.open_rows.discard(row)


@torch.inference_mode()
def verify_draft(
    model: Any, batch: Batch, tried: Sequence[Sequence[int]], limits: StopCriteria
) -> Turns[DecodingState]:
    """Verify a draft answer for every row in one pass, and start decoding after it.

    The pass gives the most probable token after the prompt and after every draft token. The answer follows the draft up to the
    first token that differs, so its tokens are those of plain greedy decoding.

    Args:
        model: The model.
        batch: Its sequences end with the draft tokens.
        tried: Draft tokens by row; `[]` for none.
        limits: When an answer ends.
    """
    # 1. Compute the most probable token, and the draft token's probability, after the prompt and each draft token but the last.
    draft_positions = [(row, i) for row, text in enumerate(tried) for i in range(max(1, len(text)))]
    last, cache, hidden, draft_tokens = _run_drafts(model, batch, tried, draft_positions)
    best, probabilities = yield from _most_probable(model, hidden, draft_tokens)
    rows = range(len(batch.rows))
    answers = DecodingState(
        tokens=[[] for _ in rows],
        open_rows=set(rows),
        likely=[[] for _ in rows],
        matching=[bool(text) for text in tried],
        cache_rows=list(rows),
        mask=batch.attention_mask,  # these three are corrected in step 4
        positions=batch.position_ids[:, -1:],
        padded=None if batch.padded_rows is None else list(batch.padded_rows),
        cache=cache,
        trials=None if batch.trials is None else Index(batch.trials),
    )
    # 2. Accept draft tokens up to the first that differs.
    diverged: set[int] = set()
    for (row, i), token, probability in zip(draft_positions, best, probabilities, strict=True):
        if tried[row]:
            answers.likely[row].append(probability)
            answers.matching[row] &= token == tried[row][i]
        if row in answers.open_rows and row not in diverged:
            limits.append_tokens(answers, row, token)
            if not tried[row] or token != tried[row][i]:
                diverged.add(row)
    # 3. Add the next token to answers that contain their whole draft.
    whole = [row for row in answers.open_rows if row not in diverged]
    if whole:
        following = last[to_device(whole, last.device)]
        best, _ = yield from _most_probable(model, following, torch.zeros_like(following[:, 0], dtype=torch.long))
        for row, token in zip(whole, best, strict=True):
            limits.append_tokens(answers, row, token)
    # 4. Mask the cache slots of rejected draft tokens. Of an answer, the last token is not in the cache yet.
    rejected = [len(text) - max(0, len(answers.tokens[row]) - 1) if text else 0 for row, text in enumerate(tried)]
    by_row = to_device(rejected, answers.mask.device)[:, None]
    slots = torch.arange(answers.mask.shape[1], device=answers.mask.device)
    answers.mask = answers.mask * (slots < len(slots) - by_row)
    answers.positions = answers.positions + 1 - by_row
    if answers.padded is not None:
        answers.padded = [padded or count > 0 for padded, count in zip(answers.padded, rejected, strict=True)]
    if not rows_selectable(cache) and any(tried):
        answers.cache = None  # recurrent states cannot drop a rejected token
    return answers


def _run_drafts(
    model: Any, batch: Batch, tried: Sequence[Sequence[int]], draft_positions: Sequence[tuple[int, int]]
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Launch the pass of a draft: the last hidden states [rows, width], the cache, the states before each draft token, these."""
    hidden, cache = hidden_states(model, batch, use_cache=True)
    length = hidden.shape[1]
    picked = [(row, length - len(tried[row]) - 1 + i, tried[row][i] if tried[row] else 0) for row, i in draft_positions]
    row_of, position, draft_tokens = to_device(picked, hidden.device).unbind(1)
    return hidden[:, -1].clone(), cache, hidden[row_of, position], draft_tokens


def _most_probable(model: Any, hidden: Tensor, wanted: Tensor) -> Turns[tuple[list[int], list[float]]]:
    """Return the most probable next token, and the wanted one's probability, for hidden states [rows, width]; after one turn."""
    copies = HostCopies()
    in_ram = yield from launch_head(model, hidden, lambda at_head: copies.copy(_compare(model, at_head, wanted)))
    copies.wait()
    best, probability = in_ram.tolist()
    return [int(token) for token in best], probability


def _compare(model: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Return the most probable tokens and the probabilities of the wanted ones [2, rows]."""
    found = []
    for rows, log_probs in log_probs_of(model, hidden):
        chosen = log_probs.gather(1, to_device(wanted[rows, None], log_probs.device))
        probabilities = chosen.exp()[:, 0].nan_to_num(0.0)  # NaN: a destroyed model
        # One copy for both: float32 holds every token id exactly, and not every kind of device has float64.
        found.append(torch.stack([fast_argmax(log_probs).float(), probabilities.float()]))
    return torch.cat(found, dim=1)


@torch.inference_mode()
def continue_decoding(
    model: Any, answers: DecodingState, limits: StopCriteria, graphs: DecodingGraphs | None = None
) -> Turns[None]:
    """Decode until every row has ended; completes `answers.tokens`."""
    device = answers.mask.device
    graph: DecodingGraph | None = None
    interval = SYNC_INTERVAL.get(device.type, DEFAULT_SYNC_INTERVAL)
    tokens = to_device([answers.tokens[row][-1:] or [0] for row in answers.cache_rows], device)
    if not (graphs and answers.open_rows and graphs.suit(model, answers, tokens)):
        graphs = None
    compact_below = COMPACT_WITH_GRAPHS if graphs else COMPACT_BELOW
    while answers.open_rows:
        if len(answers.open_rows) <= compact_below * len(answers.cache_rows) and rows_selectable(answers.cache):
            graph = None  # frees its memory
            tokens = tokens[_select_open_rows(answers)]
        remaining = limits.max_tokens - min(len(answers.tokens[row]) for row in answers.open_rows)
        count = min(interval, remaining)
        if graphs:
            graph = graph or DecodingGraph(graphs, model, answers, tokens, remaining, interval)
            chosen = yield from graph.decode(count)
        else:
            make_room(answers.cache, remaining)
            chosen = yield from _decode_tokens(model, answers, tokens, count)
        tokens = chosen[:, -1:]
        copies = HostCopies()
        in_ram = copies.copy(chosen)
        copies.wait()
        for row, following in zip(answers.cache_rows, in_ram.tolist(), strict=True):
            for token in following:
                if row in answers.open_rows:
                    limits.append_tokens(answers, row, token)


def _decode_tokens(model: Any, answers: DecodingState, tokens: Tensor, count: int) -> Turns[Tensor]:
    """Decode `count` tokens after `tokens` [cache rows, 1] without reading any, one a turn; returns them [cache rows, tokens].

    They stay on the device of the model's inputs. The logits stay on that of its head.
    """
    slots = answers.mask.shape[1]
    answers.mask = torch.cat([answers.mask, answers.mask.new_ones(len(answers.mask), count)], dim=1)
    padded = None if answers.padded is None else any(answers.padded[row] for row in answers.cache_rows)
    steps, apart = [], head_apart(model)

    def choose(logits: Tensor) -> Callable[[], Tensor]:
        return send_through_ram(fast_argmax(logits)[:, None], answers.mask.device)

    for step in range(count):
        with rows_of_trials(answers.trials), known_padding(padded), outputs_stay(model):
            output = forward_supported(
                decoder_of(model) if apart else model,
                tokens,
                attention_mask=answers.mask[:, : slots + step + 1],
                position_ids=answers.positions,
                past_key_values=answers.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        answers.cache = output.past_key_values
        answers.positions = answers.positions + 1
        if apart:
            arrive = yield from launch_head(
                model, output.last_hidden_state[:, -1], lambda at_head: choose(logits_of(model, at_head))
            )
        else:
            arrive = choose(output.logits[:, -1])
            del output  # another batch needs the memory of the logits
            yield
        tokens = arrive()
        steps.append(tokens)
    return torch.cat(steps, dim=1)


def _select_open_rows(answers: DecodingState) -> Tensor:
    """Remove ended rows from the cache; returns the cache indices of the others."""
    keep = [i for i, row in enumerate(answers.cache_rows) if row in answers.open_rows]
    select_rows(answers.cache, keep)
    index = to_device(keep, answers.mask.device)
    answers.mask, answers.positions = answers.mask[index], answers.positions[index]
    if answers.trials is not None:
        answers.trials = Index([answers.trials.values[i] for i in keep])
    answers.cache_rows = [answers.cache_rows[i] for i in keep]
    return index


def decode(
    model: Any,
    batch: Batch,
    max_tokens: int,
    end_tokens: set[int],
    ended: Ended | None = None,
    graphs: DecodingGraphs | None = None,
) -> Turns[list[list[int]]]:
    """Decode every row greedily: at most `max_tokens` tokens, without the end token.

    A row ends at an end token or when `ended(row, tokens so far)` is true. The penalties of the model's generation config are not
    applied, so the result depends on the weights alone.
    """
    if not has_cache(model):
        return _generate(model, batch, max_tokens, end_tokens)
    limits = StopCriteria(max_tokens, end_tokens, ended)
    answers = yield from verify_draft(model, batch, [[]] * len(batch.rows), limits)
    if answers.cache is None:  # the layers hold it (RecurrentGemma)
        return _generate(model, batch, max_tokens, end_tokens)
    yield from continue_decoding(model, answers, limits, graphs)
    return answers.tokens


def has_cache(model: Any) -> bool:
    """Return whether the model accepts a cache; transformers' generate decodes others, without ending rows early."""
    return "past_key_values" in supported_arguments(model.__class__)


def greedy(language_model: LanguageModel, tokens: int) -> Callable[[Batch], Turns[list[list[int]]]]:
    """Return a batcher's step that decodes at most `tokens` tokens of every answer."""
    return lambda batch: decode(language_model.model, batch, tokens, language_model.end_tokens)


@torch.inference_mode()
def decoded_by_generate(model: Any, device: torch.device | str) -> bool:
    """Return whether transformers' generate has to decode answers, by a pass over one token."""
    if not has_cache(model):
        return True
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    return getattr(forward_supported(model, token, use_cache=True), "past_key_values", None) is None


@torch.inference_mode()
def _generate(model: Any, batch: Batch, max_tokens: int, end_tokens: set[int]) -> list[list[int]]:
    """Decode a model that has no key-value cache."""
    ends = sorted(end_tokens)
    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if ends else 0
    )
    try:
        with rows_of_trials(None if batch.trials is None else Index(batch.trials)):
            output = model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # of the model's own code
        if is_device_error(error):
            raise
        raise UserError(
            f"transformers cannot generate with {type(model).__name__}: {first_line(error)}",
            code="architecture-not-supported",
            fix="see docs/architectures.md for the architectures that work",
        ) from error
    answers = output[:, batch.input_ids.shape[1] :].tolist()
    return [a[: next((i for i, t in enumerate(a) if t in end_tokens), len(a))] for a in answers]
