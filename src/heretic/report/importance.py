"""Parameter importances by Optuna's PED-ANOVA evaluator, in bounded time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection

import optuna
from optuna.trial import FrozenTrial, TrialState

FEWEST_TRIALS = 20
MOST_TRIALS = 1000  # evaluated; of more trials an even subset

GOALS: dict[str, Callable[[FrozenTrial], float] | None] = {
    "to reach the Pareto front": None,
    "for few refusals": lambda trial: trial.values[1],
    "for a small KL": lambda trial: trial.values[0],
}


def importances(study: optuna.Study, without: Collection[int] = ()) -> dict[str, dict[str, float]]:
    """Return, by goal, the share of every parameter, the most important first; empty with too few trials.

    They use the objective values reported to the search, which are estimates for pruned trials.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    complete = [trial for trial in complete if trial.number not in without]
    if len(complete) < FEWEST_TRIALS:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # loads scikit-learn: a second

    step = max(1, len(complete) // MOST_TRIALS)
    subset = optuna.create_study(directions=study.directions)
    subset.add_trials([_bare(t) for t in complete[::step] if t.params])
    evaluator = PedAnovaImportanceEvaluator()
    shares_by_goal = {}
    for goal, target in GOALS.items():
        with warnings.catch_warnings():  # it warns that it treats smaller values as better, which is right
            warnings.simplefilter("ignore", UserWarning)
            shares = get_param_importances(subset, evaluator=evaluator, target=target)
        if sum(shares.values()) > 0:
            shares_by_goal[goal] = shares
    return shares_by_goal


def _bare(trial: FrozenTrial) -> FrozenTrial:
    """A trial with only what the evaluator reads."""
    return optuna.trial.create_trial(values=trial.values, params=trial.params, distributions=trial.distributions)
