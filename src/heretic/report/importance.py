"""Which parameters mattered, by Optuna's own evaluator (PED-ANOVA), in bounded time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

FEWEST_TRIALS = 20
MOST_TRIALS = 1000  # that are looked at; of more, so many at equal distances

GOALS: dict[str, Callable[[FrozenTrial], float] | None] = {
    "to reach the front": None,
    "for few refusals": lambda trial: trial.values[1],
    "for a small KL": lambda trial: trial.values[0],
}


def importances(study: optuna.Study, without: Collection[int] = ()) -> dict[str, dict[str, float]]:
    """By goal the share of every parameter, the most important ones first; empty where there are too few trials to tell.

    They are those of the values that the search was told: estimates where a trial was left early.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    complete = [trial for trial in complete if trial.number not in without]
    if len(complete) < FEWEST_TRIALS:
        return {}
    step = max(1, len(complete) // MOST_TRIALS)
    part = optuna.create_study(directions=study.directions)
    part.add_trials([_bare(t) for t in complete[::step] if t.params])
    evaluator = PedAnovaImportanceEvaluator()
    found = {}
    for goal, target in GOALS.items():
        with warnings.catch_warnings():  # it says that smaller values count as better, which they are
            warnings.simplefilter("ignore", UserWarning)
            shares = get_param_importances(part, evaluator=evaluator, target=target)
        if sum(shares.values()) > 0:
            found[goal] = shares
    return found


def _bare(trial: FrozenTrial) -> FrozenTrial:
    """What the evaluator reads of a trial."""
    return optuna.trial.create_trial(values=trial.values, params=trial.params, distributions=trial.distributions)
