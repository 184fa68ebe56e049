"""Proving a written model: it is loaded from its files and must answer as the attached model did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heretic.errors import VerificationFailed
from heretic.model.checkpoint import open_checkpoint
from heretic.progress import Watcher
from heretic.prompts import PromptSets
from heretic.scoring.divergence import divergences, first_token_log_probs
from heretic.scoring.ladder import Scores
from heretic.session import LoadPlan, open_bench
from heretic.settings import Settings
from heretic.stop import Stop

# Mean KL between the attached and the written model. Rounding edited weights to bfloat16 gives 1e-5 to 1e-3; a wrong or
# missing edit gives what the ablation itself is worth.
TOLERATED = 0.01


@dataclass(frozen=True)
class Verification:
    """How far the written model is from the attached one (mean KL in nats, largest difference of log-probabilities among
    tokens of at least 0.1 % probability), and its scores, measured anew."""

    divergence: float
    largest_difference: float
    scores: Scores


def verify(
    folder: str,
    settings: Settings,
    prompts: PromptSets,
    plan: LoadPlan,
    response_prefix: str,
    baseline: Tensor,
    attached: Tensor,
    watcher: Watcher,
    stop: Stop,
) -> Verification:
    """Load `folder`, compare with `attached` [prompts, vocabulary] and measure the scores again. Raises VerificationFailed."""
    checkpoint = open_checkpoint(folder, trust_remote_code=[folder] if settings.trust_remote_code else [])
    trusting = settings.model_copy(update={"trust_remote_code": [folder] if settings.trust_remote_code else []})
    bench = open_bench(trusting, checkpoint, prompts, plan, watcher, stop, response_prefix)
    written = first_token_log_probs(
        bench.language_model, bench.ladder.harmless, bench.batcher, "Verifying the written model"
    )
    divergence = float(divergences(attached, written).mean())
    likely = attached > torch.log(torch.tensor(1e-3))
    largest = float((attached - written)[likely].abs().max())
    if not divergence <= TOLERATED:
        raise VerificationFailed(
            f"The written model does not answer as the measured one did (mean KL {divergence:.4f} between them).",
            where=folder,
            fix="this is a defect of heretic or of the disk: please report it with run.log; the study is kept",
        )
    return Verification(divergence, largest, bench.ladder.score(baseline))
