"""KL divergence between the original and the ablated model at the first answer tokens of harmless prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heretic.model.batching import UNEDITED, Batch, Batcher, EditSpec
from heretic.model.forward import hidden_states, log_probs_of
from heretic.model.loading import LanguageModel
from heretic.model.transfer import rows_to_device, to_host
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs, last_hidden


@dataclass(frozen=True)
class Divergence:
    """KL(original || ablated) over prompts, in nats.

    `per_prompt` holds one value per prompt, in order; it is empty in a divergence that was loaded from storage.
    """

    mean: float
    median: float
    p95: float
    max: float
    per_prompt: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Divergence:
        """Restore a divergence from the result of `as_dict`."""
        mean, median, p95, largest = (float(data[name]) for name in ("mean", "median", "p95", "max"))
        return cls(mean, median, p95, largest)

    def __str__(self) -> str:
        """Format the four numbers in one line."""
        return f"mean {self.mean:.4f}, median {self.median:.4f}, p95 {self.p95:.4f}, max {self.max:.4f}"

    def as_dict(self) -> dict[str, float | str]:
        """Return the four numbers as plain data; infinity becomes the string "inf", since JSON has no such number."""
        numbers = {"mean": self.mean, "median": self.median, "p95": self.p95, "max": self.max}
        return {k: v if v < float("inf") else "inf" for k, v in numbers.items()}


def first_token_log_probs(
    language_model: LanguageModel, sequences: Sequence[list[int]], batcher: Batcher, name: str = "Baseline"
) -> Tensor:
    """Compute the log-probabilities of every prompt's next token, float32 [prompts, vocabulary] on the CPU."""
    return all_log_probs(language_model, first_tokens(sequences), batcher, name)


def first_tokens(sequences: Sequence[list[int]]) -> TeacherForcedTexts:
    """Build teacher-forced texts that predict only the token after each prompt."""
    return TeacherForcedTexts.of(sequences, [[0]] * len(sequences))


def measure_divergence(
    language_model: LanguageModel,
    targets: TeacherForcedTexts,
    baseline: Tensor,
    batcher: Batcher,
    edited: EditSpec = UNEDITED,
) -> list[Divergence]:
    """Compare the model's current state with the original, and return one summary per trial in the pass.

    A prompt's divergence is the mean over its tokens. Probabilities are computed in chunks of tokens to bound memory.

    Args:
        baseline: log-probabilities of the original model [predicted tokens, vocabulary].

    Raises:
        ValueError: if the baseline has a different number of tokens than the texts.
    """
    counts = targets.counts
    if len(baseline) != sum(counts):
        raise ValueError(f"the baseline has {len(baseline)} tokens, but the texts predict {sum(counts)}")
    starts = [sum(counts[:i]) for i in range(len(counts))]

    @torch.inference_mode()
    def step(batch: Batch) -> list[float]:
        lengths = [counts[i] for i in batch.rows]
        hidden = last_hidden(hidden_states(language_model.model, batch, use_cache=False)[0], lengths)
        positions = torch.tensor([starts[i] + n for i in batch.rows for n in range(counts[i])])
        per_token = [
            divergences(rows_to_device(baseline, positions[rows], log_probs.device), log_probs)
            for rows, log_probs in log_probs_of(language_model.model, hidden)
        ]
        in_ram = to_host([torch.cat(per_token)])[0]
        return [float(of_prompt.mean()) for of_prompt in in_ram.split(lengths)]

    per_prompt = batcher.run_items("KL divergence", targets.sequences, step, edited=edited, entries=targets.entries)
    count = len(counts)
    return [
        summarize(torch.tensor([per_prompt[trial * count + i] for i in range(count)], dtype=torch.float64))
        for trial in range(edited.trials)
    ]


def divergences(original: Tensor, ablated: Tensor) -> Tensor:
    """Compute KL(original || ablated) per row from log-probabilities [rows, vocabulary]; at least 0, NaN becomes infinity."""
    # A token of probability 0 adds nothing; without the mask 0 * -inf would be NaN.
    terms = torch.where(original > -torch.inf, original.exp() * (original - ablated), torch.zeros_like(original))
    return terms.sum(-1).nan_to_num(nan=torch.inf, posinf=torch.inf).clamp_min(0)


def summarize(per_prompt: Tensor) -> Divergence:
    """Summarize the divergences of all prompts [prompts]."""
    values = tuple(per_prompt.tolist())
    if not torch.isfinite(per_prompt).all():  # torch.quantile interpolates: infinity - infinity is NaN
        ordered = per_prompt.sort().values
        indices = (len(ordered) // 2, min(len(ordered) - 1, int(0.95 * len(ordered))), -1)
        median, p95, largest = (float(ordered[i]) for i in indices)
        return Divergence(float("inf"), median, p95, largest, values)
    median, p95 = torch.quantile(per_prompt, torch.tensor([0.5, 0.95], dtype=per_prompt.dtype)).tolist()
    return Divergence(float(per_prompt.mean()), median, p95, float(per_prompt.max()), values)
