"""The search: search space, sampler, trials and Pareto front of a study."""
