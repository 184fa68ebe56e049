"""What the measurements of the original model say about the prompts and settings of a run."""

from __future__ import annotations

from heretic.progress import ProgressReporter
from heretic.runs.stored_tensors import Baseline

LOW_REFUSAL_FRACTION = 0.1  # share of the requests below which a warning is printed
CERTAIN = 0.95  # mean probability of the first token above which its KL divergence shows no change


def report_baseline(baseline: Baseline, reporter: ProgressReporter) -> None:
    """Report the original's refusals; warn if there are few, or if the KL divergence cannot show a change."""
    evasive = f" and answers {baseline.evasive} evasively" if baseline.evasive else ""
    reporter.info(f"The original model refuses {baseline.refusals} of {len(baseline.refused)} requests{evasive}.")
    if baseline.refusals < LOW_REFUSAL_FRACTION * len(baseline.refused):
        reporter.warning("The original model refuses almost nothing. Check prompts.harmful_eval and refusal_markers.")
    certainty = float(baseline.log_probs.amax(-1).exp().mean())
    if certainty > CERTAIN:
        reporter.warning(
            f"The original is almost certain of the tokens that the KL divergence is measured at (mean probability "
            f"{certainty:.3f}), so it hardly shows damage. Set response_prefix to what all answers begin with, or raise kl_tokens."
        )
