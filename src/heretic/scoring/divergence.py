"""KL divergence between the original and the ablated model at the first answer tokens of harmless prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heretic.model.batching import UNEDITED, Batch, Batcher, EditSpec
from heretic.model.forward import hidden_states, launch_head, log_probs_of
from heretic.model.loading import LanguageModel
from heretic.model.transfer import HostCopies, rows_to_device
from heretic.model.turns import Turns
from heretic.scoring.scores import Divergence
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs, last_hidden


def first_token_log_probs(language_model: LanguageModel, sequences: Sequence[list[int]], batcher: Batcher) -> Tensor:
    """Compute the log-probabilities of every prompt's next token, float32 [prompts, vocabulary] on the CPU."""
    return all_log_probs(language_model, first_tokens(sequences), batcher, "Baseline")


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
    def per_token(batch: Batch, hidden: Tensor) -> Tensor:
        positions = torch.tensor([starts[i] + n for i in batch.rows for n in range(counts[i])])
        found = [
            divergences(rows_to_device(baseline, positions[rows], log_probs.device), log_probs)
            for rows, log_probs in log_probs_of(language_model.model, hidden)
        ]
        return torch.cat(found)

    def step(batch: Batch) -> Turns[list[float]]:
        lengths, copies = [counts[i] for i in batch.rows], HostCopies()
        hidden = last_hidden(hidden_states(language_model.model, batch, use_cache=False)[0], lengths)
        in_ram = yield from launch_head(
            language_model.model, hidden, lambda at_head: copies.copy(per_token(batch, at_head))
        )
        copies.wait()
        return [float(of_prompt.mean()) for of_prompt in in_ram.split(lengths)]

    per_prompt = batcher.run_items("KL divergence", targets.sequences, step, edited=edited, entries=targets.entries)
    count = len(counts)
    return [
        summarize(torch.tensor([per_prompt[trial * count + i] for i in range(count)], dtype=torch.float64))
        for trial in range(edited.trials)
    ]


def divergence_of(original: Tensor, ablated: Tensor, counts: Sequence[int]) -> Divergence:
    """Summarize log-probabilities that exist already [predicted tokens, vocabulary]; `counts` tokens by prompt."""
    return summarize(torch.stack([part.double().mean() for part in divergences(original, ablated).split(list(counts))]))


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
