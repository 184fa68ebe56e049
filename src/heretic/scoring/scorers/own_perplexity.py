"""Perplexity of a model's answers under the original: rises with broken or unusual language."""

from __future__ import annotations

import math
from typing import Any

from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Scorer


class OwnPerplexity(Scorer):
    """Lets the original read the model's answers to `harmless_eval`."""

    name = "own_perplexity"
    meaning = "perplexity of the model's answers to `harmless_eval` under the original"
    needs_original = True

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Compute exp of the mean negative log-likelihood per token; infinite if no answer has a token."""
        pairs = [(p, a) for p, a in zip(model.harmless.tokens, model.answers(model.harmless), strict=True) if a]
        if not pairs:
            return Measurement(math.inf)
        return perplexity(model.original or model, [p for p, _ in pairs], [a for _, a in pairs])


def perplexity(reader: ScorerContext, prompts: list[list[int]], texts: list[list[int]]) -> Measurement:
    """Compute the perplexity of all tokens of the texts under the model `reader`."""
    found = reader.log_likelihoods(prompts, texts)
    nll = -sum(float(text.double().sum()) for text in found) / sum(map(len, texts))
    return Measurement(math.exp(nll) if nll < 700 else math.inf)  # exp overflows above 709
