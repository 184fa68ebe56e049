"""The search space: inside its bounds, reproducible, and able to leave a component alone."""

from __future__ import annotations

import optuna

from heretic.search.space import from_params, sample
from heretic.settings import Search

optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_draws_stay_in_bounds_and_rebuild_from_their_parameters() -> None:
    search = Search()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    untouched = 0
    for _ in range(200):
        trial = study.ask()
        ablation = sample(trial, search, 25, ["attention", "mlp"])
        assert 0.4 * 24 <= ablation.direction_index <= 0.9 * 24
        for component, kernel in ablation.kernels.items():
            assert 0 <= kernel.max_weight <= 1.5 and 0 <= kernel.min_weight <= kernel.max_weight
            assert 0.6 * 24 <= kernel.max_weight_position <= 24
            assert component == "mlp" or kernel.max_weight >= 0.8
        untouched += ablation.kernels["mlp"].max_weight == 0.0
        assert from_params(trial.params, search, 25, ["attention", "mlp"]) == ablation
    assert 10 < untouched < 60, "a seventh of the draws leaves the MLPs alone"


def test_a_fixed_range_is_a_fixed_value() -> None:
    search = Search(direction_scope=["global"], direction_index=[0.5, 0.5])
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    ablation = sample(trial, search, 21, ["mlp"])
    assert ablation.direction_index == 10.0 and ablation.scope == "global"
