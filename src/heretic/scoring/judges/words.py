"""Judge by a bag of words, which needs no model; `benchmarks/train_words.py` trains it.

Logistic regression on the TF-IDF (Spärck Jones 1972) of words and pairs of neighboring words, trained on the answers of the judge
`trained`. It sees evasions that no list of phrases holds, and costs as little as one.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.verdict import BEGINNING, EVASIVE, Exchange, Verdict, WholeAnswerJudge

FILE = "judge_words.json"  # in heretic/data
_WORD = re.compile(r"\b\w\w+\b")


def terms(text: str) -> list[str]:
    """Return the words of two letters and more of the beginning, in lower case, and the pairs of neighbors."""
    words = _WORD.findall(text[:BEGINNING].lower())
    return [*words, *map(" ".join, itertools.pairwise(words))]


@dataclass(frozen=True)
class WordWeights:
    """The logistic regression by term: inverse document frequency, then a weight for each label."""

    labels: tuple[Verdict, ...]
    bias: tuple[float, ...]
    weights: Mapping[str, Sequence[float]]

    @classmethod
    def shipped(cls) -> WordWeights:
        """Read the weights that ship with heretic."""
        data = json.loads((resources.files("heretic") / "data" / FILE).read_text(encoding="utf-8"))
        return cls(tuple(data["labels"]), tuple(data["bias"]), data["weights"])

    def label(self, text: str) -> Verdict:
        """Return the most probable label of a text."""
        counts = Counter(term for term in terms(text) if term in self.weights)
        values = {term: (1 + math.log(count)) * self.weights[term][0] for term, count in counts.items()}
        length = math.sqrt(sum(value * value for value in values.values())) or 1.0
        logits = [
            bias + sum(value * self.weights[term][1 + i] for term, value in values.items()) / length
            for i, bias in enumerate(self.bias)
        ]
        return self.labels[logits.index(max(logits))]


class WordJudge(WholeAnswerJudge):
    """Takes the best label; an answer that is no refusal may still be evasive by the rules."""

    name = "words"

    def __init__(self, evasion: Evasion) -> None:
        self.evasion, self.weights = evasion, WordWeights.shipped()

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge every answer by itself."""
        return [self._verdict(exchange) for exchange in exchanges]

    def _verdict(self, exchange: Exchange) -> Verdict:
        if self.evasion.is_empty(exchange.answer):
            return EVASIVE
        return self.evasion.checked(exchange, self.weights.label(exchange.answer))
