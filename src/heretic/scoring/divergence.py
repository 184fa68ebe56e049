"""How much an ablation changes everything else: KL divergence of the first tokens of the answers to harmless prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heretic.model.batching import UNEDITED, Batch, Batcher, EditSpec
from heretic.model.forward import hidden_states, log_probs_of
from heretic.model.loading import LanguageModel
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs, last_hidden


@dataclass(frozen=True)
class Divergence:
    """KL(original || ablated) over prompts, in nats. `per_prompt` has it for each, in order, where this was just measured."""

    mean: float
    median: float
    p95: float
    max: float
    per_prompt: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Divergence:
        """What `as_dict` gave."""
        mean, median, p95, largest = (float(data[name]) for name in ("mean", "median", "p95", "max"))
        return cls(mean, median, p95, largest)

    def __str__(self) -> str:
        """All four numbers in a line."""
        return f"mean {self.mean:.4f}, median {self.median:.4f}, p95 {self.p95:.4f}, max {self.max:.4f}"

    def as_dict(self) -> dict[str, float | str]:
        """The four numbers as plain data; infinity becomes a text, since JSON has no number for it."""
        numbers = {"mean": self.mean, "median": self.median, "p95": self.p95, "max": self.max}
        return {k: v if v < float("inf") else "inf" for k, v in numbers.items()}


def first_token_log_probs(
    language_model: LanguageModel, sequences: Sequence[list[int]], batcher: Batcher, name: str = "Baseline"
) -> Tensor:
    """Log-probabilities of every prompt's next token, float32 [prompts, vocabulary] on the CPU."""
    return all_log_probs(language_model, first_tokens(sequences), batcher, name)


def first_tokens(sequences: Sequence[list[int]]) -> TeacherForcedTexts:
    """Prompts of which the next token alone is looked at."""
    return TeacherForcedTexts.of(sequences, [[0]] * len(sequences))


def measure_divergence(
    language_model: LanguageModel,
    taught: TeacherForcedTexts,
    baseline: Tensor,
    batcher: Batcher,
    edited: EditSpec = UNEDITED,
) -> list[Divergence]:
    """Compare the model as it is now with `baseline` [all texts' tokens, vocabulary], log-probabilities of the original.

    A prompt's divergence is the mean over its tokens. One summary for every trial that shares the passes. Only some tokens'
    probabilities exist at a time.
    """
    counts = taught.counts
    if len(baseline) != sum(counts):
        raise ValueError(f"the baseline holds {len(baseline)} tokens, the prompts' answers {sum(counts)}")
    starts = [sum(counts[:i]) for i in range(len(counts))]

    @torch.inference_mode()
    def step(batch: Batch) -> list[float]:
        lengths = [counts[i] for i in batch.rows]
        picked = last_hidden(hidden_states(language_model.model, batch, use_cache=False)[0], lengths)
        places = torch.tensor([starts[i] + n for i in batch.rows for n in range(counts[i])])
        found = [
            divergences(baseline[places[rows]].to(now.device), now).cpu()
            for rows, now in log_probs_of(language_model.model, picked)
        ]
        return [float(of_prompt.mean()) for of_prompt in torch.cat(found).split(lengths)]

    found = batcher.run_items("KL divergence", taught.sequences, step, edited=edited, entries=taught.entries)
    count = len(counts)
    return [
        summarize(torch.tensor([found[trial * count + i] for i in range(count)], dtype=torch.float64))
        for trial in range(edited.trials)
    ]


def divergences(original: Tensor, ablated: Tensor) -> Tensor:
    """KL(original || ablated) per row, from log-probabilities [rows, vocabulary]; at least 0, infinite if not a number."""
    # A token of probability 0 adds nothing; without the mask 0 * -inf would be NaN.
    terms = torch.where(original > -torch.inf, original.exp() * (original - ablated), torch.zeros_like(original))
    return terms.sum(-1).nan_to_num(nan=torch.inf, posinf=torch.inf).clamp_min(0)


def summarize(per_prompt: Tensor) -> Divergence:
    """Mean, median, 95th percentile and maximum of the divergences [prompts], and these."""
    every = tuple(per_prompt.tolist())
    if not torch.isfinite(per_prompt).all():  # quantiles interpolate, and infinity minus infinity is no number
        ordered = per_prompt.sort().values
        places = (len(ordered) // 2, min(len(ordered) - 1, int(0.95 * len(ordered))), -1)
        median, p95, largest = (float(ordered[i]) for i in places)
        return Divergence(float("inf"), median, p95, largest, every)
    median, p95 = torch.quantile(per_prompt, torch.tensor([0.5, 0.95], dtype=per_prompt.dtype)).tolist()
    return Divergence(float(per_prompt.mean()), median, p95, float(per_prompt.max()), every)
