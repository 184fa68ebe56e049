"""Teacher forcing: score the first tokens of known answers in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.model.activation_cache import ActivationCache
from heretic.model.batching import Batch, Batcher
from heretic.model.decoding import greedy
from heretic.model.forward import hidden_states, launch_head, log_probs_of
from heretic.model.loading import LanguageModel
from heretic.model.transfer import RowsToStore, to_device
from heretic.model.turns import Turns


@dataclass(frozen=True)
class TeacherForcedTexts:
    """Prompts followed by the first tokens of an answer.

    The last tokens of `sequences[i]` predict `texts[i]`, one token each.
    """

    sequences: Sequence[list[int]]
    texts: Sequence[list[int]]
    entries: ActivationCache | None = None  # cached block inputs of the original

    @classmethod
    def of(cls, prompts: Sequence[list[int]], texts: Sequence[list[int]]) -> TeacherForcedTexts:
        """Append to each prompt its text (at least one token)."""
        sequences = [[*prompt, *text[:-1]] for prompt, text in zip(prompts, texts, strict=True)]
        return cls(sequences, texts)

    @property
    def counts(self) -> list[int]:
        """Number of predicted tokens by prompt."""
        return [len(text) for text in self.texts]


def answer_prefixes(
    language_model: LanguageModel, prompts: Sequence[list[int]], batcher: Batcher, tokens: int
) -> list[list[int]]:
    """Return the first `tokens` - 1 tokens of the model's greedy answers, each followed by a placeholder 0.

    The placeholder stands for the next position, whose token id is not used. An answer that ends early is shorter.
    """
    if tokens == 1:
        return [[0] for _ in prompts]
    answers = batcher.run("Original's answers", prompts, greedy(language_model, tokens - 1), decoding=True)
    return [[*answer, 0] for answer in answers]


def log_probs_at(language_model: LanguageModel, targets: TeacherForcedTexts, batcher: Batcher) -> list[Tensor]:
    """Compute log-probabilities at every predicted token, by prompt: float32 [predicted tokens, vocabulary] on the CPU."""
    return list(all_log_probs(language_model, targets, batcher, "Original's answers").split(targets.counts))


def all_log_probs(language_model: LanguageModel, targets: TeacherForcedTexts, batcher: Batcher, name: str) -> Tensor:
    """Compute log-probabilities as `log_probs_at`, in one preallocated tensor [predicted tokens, vocabulary]."""
    counts = targets.counts
    starts = [sum(counts[:i]) for i in range(len(counts))]
    buffer: list[Tensor] = []  # allocated by the first batch, which knows the vocabulary's size

    @torch.inference_mode()
    def launch(batch: Batch, predicting: Tensor, store: RowsToStore) -> None:
        positions = torch.tensor([starts[i] + n for i in batch.rows for n in range(counts[i])])
        for rows, log_probs in log_probs_of(language_model.model, predicting):
            if not buffer:
                with torch.inference_mode(False):  # an inference tensor could not take part in autograd
                    buffer.append(torch.empty(sum(counts), log_probs.shape[1], dtype=log_probs.dtype))
            store.add(buffer[0], positions[rows], log_probs)

    def step(batch: Batch) -> Turns[list[None]]:
        store = RowsToStore()
        hidden = hidden_states(language_model.model, batch, use_cache=False)[0]
        predicting = last_hidden(hidden, [counts[i] for i in batch.rows])
        del hidden  # other batches need the memory
        yield from launch_head(language_model.model, predicting, lambda at_head: launch(batch, at_head, store))
        store.write()
        return [None] * len(batch.rows)

    batcher.run(name, targets.sequences, step)
    return buffer[0]


def last_hidden(hidden: Tensor, counts: Sequence[int]) -> Tensor:
    """Select the last `counts[row]` hidden states of every row [sum of counts, width]."""
    length = hidden.shape[1]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    positions = [length - count + i for count in counts for i in range(count)]
    row, position = to_device([rows, positions], hidden.device)
    return hidden[row, position]


def row_of_token(counts: Sequence[int]) -> Tensor:
    """Return the row of each predicted token [sum of counts]."""
    return torch.tensor([row for row, count in enumerate(counts) for _ in range(count)])
