"""Objectives and numbers of scorers in a study: read as they were stored, refused if heretic cannot have written them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from heretic.scoring.objectives import DEFAULT_OBJECTIVES, Objective
from heretic.scoring.scores import Divergence, Scores
from heretic.search.integrity import check_attributes
from heretic.storage import attributes
from heretic.storage.attributes import FINGERPRINT, OBJECTIVES, SCORES, VALUES_BEFORE
from heretic.storage.rdb import open_study
from heretic.storage.url import storage_url
from tests.helpers.errors import raises

CHOSEN = (Objective("kl"), Objective("unchanged", "higher"), Objective("own_answer_kl.p95"))
PLAIN = Scores(Divergence(0.1, 0.1, 0.1, 0.1), 3, 10, {})


def opened(objectives: Any = DEFAULT_OBJECTIVES) -> optuna.Study:
    return open_study(storage_url("", Path()), "s", {"a": 1}, objectives=objectives)


def test_a_study_remembers_its_objectives() -> None:
    for _ in range(2):
        study = opened(CHOSEN)
        assert attributes.objectives(study) == CHOSEN and len(study.directions) == 3
        check_attributes(study)


def test_a_study_of_kl_and_refusals_is_stored_as_before_there_were_others() -> None:
    study = opened()
    assert OBJECTIVES not in study.user_attrs and attributes.objectives(study) == DEFAULT_OBJECTIVES
    assert attributes.values_before(study) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (OBJECTIVES, '[{"name": "kl"}]'),
        (OBJECTIVES, '[{"name": "kl"}, {"name": "x", "better": "more"}]'),
        (OBJECTIVES, '[{"name": "kl"}, {"name": "[red]x"}]'),
        (OBJECTIVES, '[{"name": "kl"}, {"name": "x"}, {"name": "y"}]'),
        (OBJECTIVES, "7"),
        (VALUES_BEFORE, '{"x": "many"}'),
        (VALUES_BEFORE, "{"),
    ],
)
def test_objectives_and_values_of_no_version_of_heretic_are_refused(name: str, value: str) -> None:
    study = opened()
    study.set_user_attr(name, value)
    with raises("damaged-study"):
        check_attributes(study)


def test_a_study_of_another_format_is_not_read() -> None:
    study = opened()
    study.set_user_attr(FINGERPRINT, json.dumps({"format": attributes.FORMAT}))
    check_attributes(study)
    study.set_user_attr(FINGERPRINT, json.dumps({"format": attributes.FORMAT - 1}))
    with raises("study-mismatch"):
        check_attributes(study)


def test_numbers_of_scorers_survive_storage_infinity_included() -> None:
    study = opened()
    scores = replace(PLAIN, values={"unchanged": 0.5, "own_answer_kl.p95": math.inf, "x": -math.inf})
    trial = study.ask()
    trial.set_user_attr(SCORES, json.loads(json.dumps(scores.as_dict(), allow_nan=False)))
    study.tell(trial, [0.1, 3.0])
    assert attributes.scores(study, study.trials[0]) == scores


@pytest.mark.parametrize("values", [{"unchanged": "nan"}, {"[bold]x": 1}, {"x\u001b[2J": 1}, {"x": "many"}])
def test_numbers_that_are_none_and_names_that_are_none_are_refused(values: dict[str, Any]) -> None:
    study = opened()
    trial = study.ask()
    trial.set_user_attr(SCORES, {**PLAIN.as_dict(), "values": values})
    study.tell(trial, [0.1, 3.0])
    with raises("damaged-study"):
        attributes.scores(study, study.trials[0])
