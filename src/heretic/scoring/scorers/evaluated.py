"""The scorers that `TrialEvaluator` measures itself, because it can share passes between them and prune trials.

Their numbers are read from `Scores` (`Scores.value`); KL and refusals are measured in every trial.
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


class OverRefusals(_Evaluated):
    """Refusals of `harmless_eval`."""

    name = "over_refusals"
    meaning = "prompts of `harmless_eval` refused or evaded"
    unit = "prompts"


class Degenerate(_Evaluated):
    """Empty or looping answers to `harmless_eval`."""

    name = "degenerate"
    meaning = "prompts of `harmless_eval` with an empty or looping answer"
    unit = "prompts"
