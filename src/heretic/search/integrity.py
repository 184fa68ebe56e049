"""Integrity checks of a stored study, run once when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from heretic.errors import UserError, first_line
from heretic.search.convergence import Convergence
from heretic.search.gradient_path import GradientPath
from heretic.storage import attributes
from heretic.storage.checksum import checksum_matches

MAX_NAMED_TRIALS = 5  # damaged trials that a warning lists


def check_study(study: optuna.Study) -> None:
    """Validate everything stored in the study. Raises UserError for the first damage."""
    check_attributes(study)
    for problem in damaged_trials(study).values():
        raise problem


def check_attributes(study: optuna.Study) -> None:
    """Validate the format and the attributes of the study itself. Raises UserError."""
    attributes.require_format(study)
    if study.directions != [StudyDirection.MINIMIZE] * len(attributes.objectives(study)):
        raise attributes.damaged(study, "it does not minimize its objectives, so heretic did not create it")
    attributes.values_before(study)
    attributes.refusals_before(study)
    attributes.trials_per_batch(study)
    attributes.requested_trials(study)
    GradientPath.load(study)
    Convergence.load(study)


def damaged_trials(study: optuna.Study) -> dict[int, UserError]:
    """Return the error of each damaged trial, by trial number."""
    damage: dict[int, UserError] = {}
    distributions: dict[str, BaseDistribution] = {}
    for trial in study.get_trials(deepcopy=False):
        try:
            _check_trial(study, trial)
            _check_distributions(study, trial, distributions)
        except UserError as error:
            damage[trial.number] = error
    return damage


def warning(damage: Mapping[int, UserError]) -> str:
    """Format the warning that damaged trials are skipped; empty if there are none."""
    if not damage:
        return ""
    numbers = [str(number) for number in damage]
    more = f" and {len(numbers) - MAX_NAMED_TRIALS} more" if len(numbers) > MAX_NAMED_TRIALS else ""
    trials = f"trial{'s' * (len(numbers) > 1)} {', '.join(numbers[:MAX_NAMED_TRIALS])}{more}"
    return f"Skipping {trials}. {next(iter(damage.values())).what} Restore a copy of the study."


def _check_trial(study: optuna.Study, trial: FrozenTrial) -> None:
    for reader in (attributes.reevaluates, attributes.start, attributes.retry, attributes.retries):
        reader(study, trial)
    attributes.failed_on_its_own(study, trial)
    attributes.fixed_params(study, trial)
    if trial.state != TrialState.COMPLETE:
        return
    values = attributes.objective_values(study, trial)
    attributes.scores(study, trial)
    attributes.pruned(study, trial)
    attributes.kl_per_prompt(study, trial)
    if not checksum_matches(trial):
        raise attributes.damaged(study, "a measurement does not match its checksum", trial)
    parts: dict[str, Any] = {"params": trial.params, "distributions": trial.distributions}
    try:  # the sampler and the report copy trials this way
        create_trial(values=values, constraints=trial.constraints, **parts)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise attributes.damaged(study, f"a parameter is invalid ({first_line(error)})", trial) from None


def _check_distributions(study: optuna.Study, trial: FrozenTrial, kinds: dict[str, BaseDistribution]) -> None:
    """Require compatible distributions of a parameter in all trials; the bounds may differ."""
    for name, distribution in trial.distributions.items():
        try:
            check_distribution_compatibility(kinds.setdefault(name, distribution), distribution)
        except ValueError:
            raise attributes.damaged(
                study, f"parameter '{name}' has another distribution than in earlier trials", trial
            ) from None
