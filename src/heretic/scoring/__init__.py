"""Scorers of a trial: KL divergence, refusals, judges, the gradient loss."""
