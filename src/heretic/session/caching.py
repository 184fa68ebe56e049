"""Caching across trials, each part enabled only if a check on this model allows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from heretic.hardware.host import format_bytes, memory
from heretic.model.activation_cache import ActivationCache, allocate_cache
from heretic.model.batching import Batch, Batcher
from heretic.model.decoding import decode
from heretic.model.forward import supports_mid_stack_start
from heretic.model.loading import LanguageModel
from heretic.model.turns import Turns
from heretic.planning.memory_model import MOST_KEPT, SHARE_KEPT
from heretic.planning.model_dims import ModelDims
from heretic.planning.workload import MOST_TRIALS
from heretic.progress import NULL_REPORTER
from heretic.scoring.evaluator import TrialEvaluator
from heretic.scoring.refusal_count import EncodedRequests

log = logging.getLogger(__name__)

MIN_SPEEDUP = 1.2  # a larger batch must decode at least this much faster
PROBES, PROBE_TOKENS = 2, 3  # runs of which the fastest counts, and tokens of their answers


def enable_caching(evaluator: TrialEvaluator, refusal_texts: Sequence[list[int]]) -> TrialEvaluator:
    """Return the evaluator with drafts from the reference refusals, and with passes that start at the first edited block.

    Both stay off if answers may exceed the window of an attention layer: rejected draft tokens would take up space in it.
    """
    model = evaluator.language_model
    requests = EncodedRequests(evaluator.harmful, refusal_texts)
    harmless = evaluator.harmless_texts.sequences
    if max(map(len, (*requests.with_drafts, *harmless))) + evaluator.max_tokens >= model.window:
        log.info("caching is off: prompts and answers are longer than the attention window")
        return evaluator
    evaluator = replace(evaluator, drafts=refusal_texts)
    if not supports_mid_stack_start(model.model, model.structure.blocks, harmless, evaluator.batcher):
        return evaluator
    return replace(
        evaluator,
        harmful_entries=allocate_activation_cache(model, requests.with_drafts, evaluator.batcher, with_cache=True),
        harmless_entries=allocate_activation_cache(model, harmless, evaluator.batcher, with_cache=False),
    )


def allocate_activation_cache(
    model: LanguageModel, sequences: Sequence[list[int]], batcher: Batcher, *, with_cache: bool
) -> ActivationCache | None:
    """Allocate a cache of the original's block inputs for these sequences; None if memory is short."""
    shape = ModelDims.of(model.model.config.get_text_config(decoder=True), model.model)
    shared = batcher.shared_prefix(sequences)
    budget = min(MOST_KEPT, int(SHARE_KEPT * memory()[1]))
    cache = allocate_cache(
        model.structure.blocks,
        sequences,
        shared.tokens if shared else [],
        with_cache=with_cache,
        bytes_per_token=(shape.hidden * shape.element, shape.cache_per_token * shape.element),
        budget=budget,
    )
    if cache is None:
        log.info(
            "every pass starts at the first block: the activation cache does not fit into %s", format_bytes(budget)
        )
    return cache


def tune_trials_per_batch(evaluator: TrialEvaluator) -> int:
    """Measure how many trials to run in one pass: double it while decoding gets at least 20 % faster and memory suffices."""
    requests = len(evaluator.harmful)
    best = 1
    rate = _rows_per_second(evaluator, requests)
    while best < MOST_TRIALS and 2 * best * requests <= evaluator.batcher.size:
        doubled = _rows_per_second(evaluator, 2 * best * requests)
        log.info("%d trials in a pass decode %.0f rows/s, half as many %.0f rows/s", 2 * best, doubled, rate)
        if doubled < MIN_SPEEDUP * rate:
            break
        best, rate = 2 * best, doubled
    return best


def _rows_per_second(evaluator: TrialEvaluator, rows: int) -> float:
    """Measure the decoded rows per second by short answers, in batches like those of trials; 0 if they run out of memory."""
    model, batcher = evaluator.language_model, replace(evaluator.batcher, reporter=NULL_REPORTER)

    def step(batch: Batch) -> Turns[list[list[int]]]:
        return decode(model.model, batch, PROBE_TOKENS, set())

    shortest = float("inf")
    for _ in range(PROBES):
        began = time.perf_counter()
        batcher.run("Trials in a pass", [[1]] * rows, step, decoding=True)
        shortest = min(shortest, time.perf_counter() - began)
    return rows * PROBE_TOKENS / shortest if batcher.size == evaluator.batcher.size else 0.0
