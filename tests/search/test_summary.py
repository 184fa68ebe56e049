"""How a study stands: what its storage alone says of its speed and its settings."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from heretic.scoring.scores import Divergence, Scores
from heretic.search.summary import StudySummary
from heretic.settings import Settings
from heretic.storage.attributes import settings_of
from heretic.storage.rdb import METRICS, open_study, save_settings
from heretic.storage.url import storage_url

NOON = datetime(2026, 1, 1, 12)


@pytest.fixture
def study() -> optuna.Study:
    return open_study(storage_url("", Path()), "s", {"a": 1})


def add(study: optuna.Study, begin: float, end: float, kl: float = 0.1, refusals: int = 3) -> None:
    """A finished trial that ran between these minutes after noon."""
    scores = Scores(Divergence(kl, kl, kl, kl), refusals, 10, {})
    trial = create_trial(
        values=[kl, refusals], user_attrs={"heretic:scores": scores.as_dict()}, state=TrialState.COMPLETE
    )
    trial.datetime_start, trial.datetime_complete = (NOON + timedelta(minutes=m) for m in (begin, end))
    study.add_trial(trial)


def test_trials_side_by_side_count_and_a_pause_does_not(study: optuna.Study) -> None:
    assert StudySummary.of(study, Settings()).trials_per_hour is None
    for begin, end in ((0, 10), (0, 10), (600, 610), (605, 620)):  # ten hours apart
        add(study, begin, end)
    summary = StudySummary.of(study, Settings(n_trials=12))
    assert summary.trials_per_hour == pytest.approx(4 / 0.5), "four trials in half an hour of work"
    assert summary.seconds_left == pytest.approx(3600)
    assert StudySummary.of(study, Settings(n_trials=4)).seconds_left is None


def test_the_best_is_the_one_that_would_be_chosen(study: optuna.Study) -> None:
    add(study, 0, 1, kl=0.5, refusals=0)
    add(study, 1, 2, kl=0.05, refusals=2)
    summary = StudySummary.of(study, Settings(max_kl=0.1))
    assert summary.best is not None and summary.best[0].number == 1 and summary.n_complete == 2


def test_whoever_opens_the_study_finds_names_and_settings_and_no_password(study: optuna.Study) -> None:
    assert study.metric_names == METRICS == ["KL divergence", "refusals"]
    assert settings_of(study) is None
    save_settings(study, Settings(model="m", n_trials=7, storage="postgresql://me:secret@host/db"))
    again = optuna.load_study(study_name="s", storage=storage_url("", Path()))
    kept = settings_of(again)
    assert kept is not None and (kept.model, kept.n_trials) == ("m", 7)
    assert "secret" not in str(again.user_attrs)
