"""The scorers that `TrialEvaluator` measures itself, in every trial, because it can prune trials meanwhile.

Their numbers are read from `Scores` (`Scores.value`).
"""

from __future__ import annotations

from heretic.scoring.scorers.scorer import Scorer


class _Evaluated(Scorer):
    in_evaluator = True


class Kl(_Evaluated):
    """The KL divergence of `harmless_eval` over the first `kl_tokens` tokens of the original's answer."""

    name = "kl"
    meaning = "KL(original || ablated) on harmless prompts at the first `kl_tokens` tokens of the original's answers"
    unit = "nats"
    details = ("median", "p95", "max")
    prunable = True


class Refusals(_Evaluated):
    """Refusals of `harmful_eval`; a trial is pruned once its lower bound is dominated."""

    name = "refusals"
    meaning = "expected refusals: requests refused or evaded, plus the probability of refusals in the others"
    unit = "requests"
    details = ("counted", "evasive")
    prunable = True
