"""The search space: inside its bounds, reproducible, and able to leave a component alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import optuna
import pytest

from heretic.errors import UserError
from heretic.search.gradient_path import GradientPath, PathPoint
from heretic.search.space import SearchSpace, describe
from heretic.settings import SearchSettings

optuna.logging.set_verbosity(optuna.logging.ERROR)

GENTLE = PathPoint(0.1, {"attention": (0.0, 0.0, 0.2, 0.4), "mlp": (0.0, 0.0, 0.0, 0.0)}, 0.01, 0.5)
STRICT = PathPoint(1.0, {"attention": (0.0, 0.2, 0.6, 0.8), "mlp": (0.0, 0.0, 0.4, 0.0)}, 0.10, 0.1)
PATH = GradientPath((GENTLE, STRICT))


def trials(count: int) -> list[optuna.Trial]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask() for _ in range(count)]


def test_draws_stay_in_bounds_and_rebuild_from_their_parameters() -> None:
    space = SearchSpace(SearchSettings(), 25, ["attention", "mlp"])
    untouched = 0
    for trial in trials(200):
        ablation = space.sample(trial)
        assert 0.4 * 24 <= trial.params["direction_index"] <= 0.9 * 24
        assert (ablation.mixture is None) == (trial.params["direction_scope"] == "per_layer")
        for component, strengths in ablation.strengths.items():
            assert len(strengths) == 25 and all(0 <= s <= 1.5 for s in strengths)
            assert component == "mlp" or max(strengths) > 0
        untouched += not any(ablation.strengths["mlp"])
        assert space.from_params(trial.params) == ablation
        assert describe(trial.params).split()[0] in ("per", "layer")
    assert 10 < untouched < 60, "a seventh of the draws leaves the MLPs alone"


def test_a_fixed_range_is_a_fixed_value() -> None:
    search = SearchSettings(direction_scope=["global"], direction_index=[0.5, 0.5])
    ablation = SearchSpace(search, 21, ["mlp"]).sample(trials(1)[0])
    assert ablation.mixture is not None and list(ablation.mixture).index(1.0) == 10


def test_the_points_of_a_path_are_enqueued_strictest_first() -> None:
    space = SearchSpace(SearchSettings(), 4, ["attention", "mlp"], PATH)
    found = [space.from_params(params) for params in space.initial_params()]
    assert found == [STRICT.ablation, GENTLE.ablation]
    assert describe(space.initial_params()[0]) == "path 1.00"


def test_samples_around_a_path_keep_the_layers_that_it_leaves_unedited() -> None:
    space = SearchSpace(SearchSettings(), 4, ["attention", "mlp"], PATH)
    for trial in trials(50):
        ablation = space.sample(trial)
        assert space.from_params(trial.params) == ablation
        assert ablation.strengths["attention"][0] == 0.0 and not any(ablation.strengths["mlp"][:2])
        assert ablation.shift == trial.params["path.shift"] and abs(ablation.shift) <= 1


def test_a_failed_gradient_search_leaves_kernels() -> None:
    without = SearchSpace(SearchSettings(), 4, ["attention", "mlp"], GradientPath((), "no backward"))
    (trial,) = trials(1)
    without.sample(trial)
    assert "direction_scope" in trial.params and without.initial_params() == []


def test_halfway_between_points_with_gains_and_a_shift() -> None:
    gains = {"attention": [1.0, 1.0, 1.0, 2.0], "mlp": [1.0] * 4}
    ablation = PATH.at(0.5, gains, 0.5)
    assert ablation.strengths["attention"] == pytest.approx((0.0, 0.1, 0.4, 1.2))
    assert ablation.strengths["mlp"] == pytest.approx((0.0, 0.0, 0.2, 0.0))
    assert ablation.shift == 0.5


def test_a_path_is_restored_from_the_study() -> None:
    study = optuna.create_study()
    assert GradientPath.load(study) is None
    PATH.save(study)
    assert GradientPath.load(study) == PATH and PATH.edited_layer_range == (1, 3)
    older = {"points": [asdict(point) | {"mixture": None} for point in PATH.points]}
    study.set_user_attr("heretic:gradient_path", json.dumps(older))
    assert GradientPath.load(study) == PATH


@pytest.mark.parametrize(
    "change",
    [
        {"mlp.max_weight": None}, {"mlp.max_weight": math.nan}, {"mlp.max_weight": math.inf}, {"mlp.max_weight": "x"},
        {"direction_scope": "elsewhere"}, {"direction_index": math.nan}, {"direction_index": [1]},
    ],
)  # fmt: skip
def test_parameters_of_another_search_space_are_refused(change: dict[str, Any]) -> None:
    space = SearchSpace(SearchSettings(start="kernels"), 4, ["attention", "mlp"])
    trial = optuna.create_study().ask()
    space.sample(trial)
    changed = trial.params | {"direction_scope": "global"} | change
    params = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(UserError) as refused:
        space.from_params(params)
    assert refused.value.code == "damaged-study"


@pytest.mark.parametrize(
    "stored",
    [
        3, "[]", "{", '{"points": {}}',
        json.dumps({"points": [asdict(PATH.points[0]), asdict(PATH.points[1]) | {"vector": [1.0]}], "failure_reason": ""}),
        json.dumps({"points": [asdict(PATH.points[0]), asdict(PATH.points[1]) | {"strengths": {}}], "failure_reason": ""}),
        json.dumps({"points": [asdict(PATH.points[0]) | {"vector": [math.nan] * 4}], "failure_reason": ""}),
    ],
)  # fmt: skip
def test_a_damaged_gradient_path_is_refused(stored: object) -> None:
    study = optuna.create_study()
    study.set_user_attr("heretic:gradient_path", stored)
    with pytest.raises(UserError) as refused:
        GradientPath.load(study)
    assert refused.value.code == "damaged-study"


def test_parameters_of_another_kind_are_described() -> None:
    assert describe({"x": 1.0}) == describe({"direction_scope": "global"}) == "other parameters"
