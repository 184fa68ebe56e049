"""What all answers of a model begin with, such as an opened thinking block: found by asking it."""

from __future__ import annotations

from collections.abc import Mapping

from heretic.model.batching import Batch, Batcher
from heretic.model.chat_format import common_prefix
from heretic.model.decoding import decode
from heretic.model.loading import LanguageModel

# How many prompts of each kind, and how many tokens, show what all answers begin with.
PREFIX_PROMPTS = 8
PREFIX_TOKENS = 16


def find_prefix(language_model: LanguageModel, encoded: Mapping[str, list[list[int]]], batcher: Batcher) -> str:
    """What the model's answers to harmful and harmless prompts alike begin with; empty if nothing."""
    asked = [*encoded["harmful_train"][:PREFIX_PROMPTS], *encoded["harmless_train"][:PREFIX_PROMPTS]]

    def step(batch: Batch) -> list[str]:
        tokens = decode(language_model.model, batch, PREFIX_TOKENS, language_model.end_tokens)
        # Special tokens are kept: thinking blocks and channels are made of them.
        return [str(language_model.tokenizer.decode(t)) for t in tokens]

    return common_prefix(batcher.run("Looking for a common beginning of answers", asked, step))
