"""Whether answers are still language: how long they are, how much they repeat, and how probable the original finds them."""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from heretic.model.batching import Batch
from heretic.model.decoding import decode
from heretic.model.turns import Turns
from heretic.scoring.judges.evasion import LOOP, repetition
from heretic.scoring.teacher_forcing import TeacherForcedTexts, log_probs_at
from heretic.session.model_context import ModelContext

TOKENS = 64
PROMPTS_AT_ONCE = 4  # log-probabilities over the vocabulary exist for so many answers at a time


@torch.inference_mode()
def answers(model_context: ModelContext, sequences: Sequence[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    """Greedy answers of the model as it is now."""
    model, ends = model_context.language_model.model, model_context.language_model.end_tokens

    def step(batch: Batch) -> Turns[list[list[int]]]:
        return decode(model, batch, tokens, ends)

    return model_context.batcher.run("Answers", sequences, step, decoding=True)


def described(original: ModelContext, sequences: Sequence[list[int]], said: Sequence[list[int]]) -> dict[str, Any]:
    """Mean length in tokens, empty answers, mean share of repeated 4-grams, how many answers are more than half repetition,
    and the perplexity of the tokens under the original, which `original` must hold unedited."""
    repeated = [repetition(answer) for answer in said]
    return {
        "tokens": round(statistics.mean(map(len, said)), 1),
        "empty": sum(not answer for answer in said),
        "repeated": round(statistics.mean(repeated), 3),
        "loops": sum(share > LOOP for share in repeated),
        "perplexity": round(perplexity(original, sequences, said), 2),
    }


def perplexity(original: ModelContext, sequences: Sequence[list[int]], said: Sequence[list[int]]) -> float:
    """Of all tokens of the answers that are not empty."""
    pairs = [(list(s), list(a)) for s, a in zip(sequences, said, strict=True) if a]
    total = count = 0.0
    for start in range(0, len(pairs), PROMPTS_AT_ONCE):
        prompts, texts = zip(*pairs[start : start + PROMPTS_AT_ONCE], strict=True)
        found = log_probs_at(original.language_model, TeacherForcedTexts.of(prompts, texts), original.batcher)
        for log_probs, text in zip(found, texts, strict=True):
            total -= float(log_probs.gather(1, torch.tensor(text)[:, None]).sum())
            count += len(text)
    return math.exp(total / count) if count else math.nan
