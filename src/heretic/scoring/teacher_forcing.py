"""Prompts with the first tokens of a known answer behind them: what a model makes of every one of these tokens, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.model.activation_cache import ActivationCache
from heretic.model.batching import Batch, Batcher
from heretic.model.decoding import decode
from heretic.model.forward import log_probs_of, run_decoder
from heretic.model.loading import LanguageModel


@dataclass(frozen=True)
class TeacherForcedTexts:
    """Prompts with the first tokens of an answer behind them: `texts[i]` are predicted from the last tokens of `sequences[i]`,
    one each. `entries` are what the original's blocks receive for the sequences, if that is kept."""

    sequences: Sequence[list[int]]
    texts: Sequence[list[int]]
    entries: ActivationCache | None = None

    @classmethod
    def of(cls, prompts: Sequence[list[int]], texts: Sequence[list[int]]) -> TeacherForcedTexts:
        """Each prompt with its text, which has at least one token."""
        sequences = [[*prompt, *text[:-1]] for prompt, text in zip(prompts, texts, strict=True)]
        return cls(sequences, texts)

    @property
    def counts(self) -> list[int]:
        """How many tokens are predicted, by prompt."""
        return [len(text) for text in self.texts]


def answer_prefixes(
    language_model: LanguageModel, prompts: Sequence[list[int]], batcher: Batcher, tokens: int
) -> list[list[int]]:
    """The first tokens of the model's own greedy answers, and one more whose place is all that counts; fewer where an answer
    ends."""
    if tokens == 1:
        return [[0] for _ in prompts]

    def step(batch: Batch) -> list[list[int]]:
        return decode(language_model.model, batch, tokens - 1, language_model.end_tokens)

    return [[*text, 0] for text in batcher.run("Original's answers", prompts, step)]


def log_probs_at(
    language_model: LanguageModel, taught: TeacherForcedTexts, batcher: Batcher, name: str = "Original's answers"
) -> list[Tensor]:
    """Log-probabilities of the model as it is at every predicted token, float32 [texts, vocabulary] on the CPU, by prompt."""
    return list(all_log_probs(language_model, taught, batcher, name).split(taught.counts))


@torch.inference_mode()
def all_log_probs(language_model: LanguageModel, taught: TeacherForcedTexts, batcher: Batcher, name: str) -> Tensor:
    """As `log_probs_at`, in one tensor [all texts' tokens, vocabulary], which is written in place: nothing is held twice."""
    counts = taught.counts
    starts = [sum(counts[:i]) for i in range(len(counts))]
    found: list[Tensor] = []

    def step(batch: Batch) -> list[None]:
        hidden, _ = run_decoder(language_model.model, batch, use_cache=False)
        picked = last_hidden(hidden, [counts[i] for i in batch.rows])
        places = torch.tensor([starts[i] + n for i in batch.rows for n in range(counts[i])])
        for rows, now in log_probs_of(language_model.model, picked):
            if not found:
                with torch.inference_mode(False):  # so that gradients may be taken with it
                    found.append(torch.empty(sum(counts), now.shape[1], dtype=now.dtype))
            found[0][places[rows]] = now.cpu()
        return [None] * len(batch.rows)

    batcher.run(name, taught.sequences, step)
    return found[0]


def last_hidden(hidden: Tensor, counts: Sequence[int]) -> Tensor:
    """The last hidden states of every row, as many as `counts` says [sum of counts, width]."""
    length = hidden.shape[1]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    places = [length - count + i for count in counts for i in range(count)]
    return hidden[torch.tensor(rows, device=hidden.device), torch.tensor(places, device=hidden.device)]


def row_of_place(counts: Sequence[int]) -> Tensor:
    """To which row each predicted token belongs [sum of counts]."""
    return torch.tensor([row for row, count in enumerate(counts) for _ in range(count)])
