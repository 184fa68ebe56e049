"""Bounds that the front crowds give way, the same way after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from heretic.scoring.divergence import Divergence
from heretic.scoring.ladder import Scores
from heretic.search.attributes import WIDENED
from heretic.search.bounds import EVERY, widened
from heretic.search.sampler import sampler
from heretic.search.space import Space
from heretic.settings import Search, Settings

SEARCH = Search(start="kernels", widen_bounds=True, n_startup_trials=10)
SPACE = Space(SEARCH, 25, ["attention", "mlp"])


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def study(name: str = "") -> optuna.Study:
    """In a file, to be gone on with; without a name in memory, which is several times as fast."""
    url = f"sqlite:///{Path(name).resolve()}" if name else None
    return optuna.create_study(storage=url, directions=["minimize"] * 2, load_if_exists=True, study_name="s")


def go_on(of: optuna.Study, until: int, space: Space = SPACE) -> list[dict[str, Any]]:
    """Trials whose refusals fall with the strength in attention, and whose KL does not care."""
    while (number := len(of.get_trials(deepcopy=False))) < until:
        of.sampler = sampler(Settings(search=SEARCH), number)
        trial = of.ask()
        widened(of, space).sample(trial)
        strength, other = trial.params["attention.max_weight"], trial.params["mlp.max_weight"]
        kl, refusals = 0.1 + 0.01 * strength + 0.1 * abs(other - 0.3), round(1000 - 300 * strength)
        trial.set_user_attr("scores", Scores(Divergence(kl, kl, kl, kl), refusals, 1000, {}).as_dict())
        of.tell(trial, [kl, refusals])
    return [t.params for t in of.get_trials(deepcopy=False)]


def test_the_crowded_bound_rises_and_resumption_draws_the_same() -> None:
    whole = go_on(study(), 50)
    assert max(p["attention.max_weight"] for p in whole[:EVERY]) <= 1.5
    assert max(p["attention.max_weight"] for p in whole[EVERY:]) > 1.5
    assert max(p["mlp.max_weight"] for p in whole) <= 1.5, "nothing crowds this one"
    for until in (7, EVERY, EVERY + 1, 33):
        go_on(study("parts.db"), until)
    assert go_on(study("parts.db"), 50) == whole
    for params in whole:
        assert (
            SPACE.from_params(params).strengths["attention"]
            == Space(SEARCH, 25, SPACE.components).from_params(params).strengths["attention"]
        )


def test_bounds_rise_a_few_times_only_and_never_unasked() -> None:
    of = study()
    go_on(of, 130)
    assert widened(of, SPACE).search.attention.max_weight[1] <= 1.5 + 1.5 * 0.7
    same = Space(Search(start="kernels"), 25, ["attention", "mlp"])
    plain = study()
    go_on(plain, 45, same)
    assert WIDENED not in plain.user_attrs and widened(plain, same) is same
