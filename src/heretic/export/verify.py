"""Proving a written model: it is loaded from its files and must answer as the attached model did."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heretic.errors import VerificationFailed
from heretic.model.checkpoint import open_checkpoint
from heretic.progress import Watcher
from heretic.prompts import PromptSets
from heretic.run_folder import Baseline
from heretic.scoring.divergence import divergences
from heretic.scoring.ladder import Scores
from heretic.scoring.taught import all_log_probs
from heretic.scoring.verdict import Judge
from heretic.session import LoadPlan, open_bench
from heretic.settings import Settings
from heretic.stop import Stop

# A wrong or missing edit moves the answers by about what the ablation itself moves them, so the mean KL between the attached
# and the written model may be this share of the ablation's KL, besides what rounding the edited weights does.
TOLERATED_SHARE = 0.1
ROUNDING = {"float32": 1e-4}  # weights are stored in the checkpoint's format, mostly bfloat16
ROUNDING_IN_HALF_PRECISION = 2e-3  # two passes in bfloat16 differ besides


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
    baseline: Baseline,
    judge: Judge,
    attached: Tensor,
    ablated_by: float,
    from_gguf: bool,
    watcher: Watcher,
    stop: Stop,
) -> Verification:
    """Load `folder`, compare with `attached` [tokens, vocabulary] and measure the scores again, by the `judge` of the study.

    `ablated_by` is the mean KL between the original and the attached model; a model `from_gguf` was rounded
    as a whole. Raises VerificationFailed.
    """
    checkpoint = open_checkpoint(folder, trust_remote_code=[folder] if settings.trust_remote_code else [])
    trusting = settings.model_copy(update={"trust_remote_code": [folder] if settings.trust_remote_code else []})
    bench = open_bench(trusting, checkpoint, prompts, plan, watcher, stop, baseline.response_prefix, judge)
    ladder = replace(bench.ladder, answered=baseline.answered)
    written = all_log_probs(bench.language_model, ladder.taught, bench.batcher, "Verifying the written model")
    divergence = float(divergences(attached, written).mean())
    likely = attached > torch.log(torch.tensor(1e-3))
    largest = float((attached - written)[likely].abs().max())
    rounding = ROUNDING.get("" if from_gguf else plan.dtypes[0], ROUNDING_IN_HALF_PRECISION)
    tolerated = TOLERATED_SHARE * ablated_by + rounding
    if not divergence <= tolerated:
        raise VerificationFailed(
            f"The written model does not answer as the measured one did: mean KL {divergence:.1e}, tolerated {tolerated:.1e}.",
            where=folder,
            fix="this is a defect of heretic or of the disk: please report it with run.log; the study is kept",
        )
    return Verification(divergence, largest, ladder.score(baseline.log_probs))
