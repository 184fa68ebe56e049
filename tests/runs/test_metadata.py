"""Sessions of a study with different versions of the packages that can change measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import transformers

from heretic._version import __version__
from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.runs.folder import REPORT
from heretic.runs.metadata import RunMetadata, warn_of_other_versions
from heretic.settings.sources import resolve
from heretic.storage.attributes import METADATA
from tests.helpers.reporters import RecordingReporter

NOW = {"heretic": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
OLD = {"heretic": "0.0.1", "torch": "1.9.1+cu111", "transformers": "4.2.0"}


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


def metadata(versions: dict[str, str]) -> RunMetadata:
    return RunMetadata(2, ("mlp",), "01", {**versions, "RAM": "much"})


def warnings(study: optuna.Study) -> list[str]:
    reporter = RecordingReporter()
    warn_of_other_versions(study, reporter)
    return reporter.warnings


def store(study: optuna.Study, **changes: Any) -> None:
    stored = json.loads(study.user_attrs.get(METADATA, "{}"))
    study.set_user_attr(METADATA, json.dumps({**stored, **changes}))


def test_a_study_that_goes_on_after_an_update_warns_once_and_keeps_all_versions(config: Path) -> None:
    def session(n_trials: int) -> tuple[optuna.Study, list[str]]:
        reporter = RecordingReporter()
        chosen = resolve(config, {"run_name": "mine", "n_trials": n_trials})
        folder = run(chosen, reporter=reporter, stop=StopSignal()).folder.path
        study = optuna.load_study(study_name="heretic", storage=f"sqlite:///{folder / 'study.db'}")
        return study, [text for text in reporter.warnings if "torch" in text or "heretic 0.0.1" in text]

    study, warned = session(1)
    assert not warned
    stored = json.loads(study.user_attrs[METADATA])
    del stored["earlier_versions"]  # as before this was stored
    study.set_user_attr(METADATA, json.dumps({**stored, "environment": {**stored["environment"], **OLD}}))
    _, warned = session(1)
    assert not warned, "nothing is measured"
    study, warned = session(2)
    assert len(warned) == 1 and all(text in warned[0] for text in ("heretic 0.0.1", "torch 1.9,", "transformers 4.2,"))
    about = RunMetadata.load(study)
    assert about is not None and about.versions == NOW and about.earlier_versions == (OLD,)
    assert "torch 1.9.1+cu111" in Path("runs/mine", REPORT).read_text()
    study, warned = session(3)
    about = RunMetadata.load(study)
    assert not warned and about is not None and about.earlier_versions == (OLD,)


def test_every_set_of_versions_is_kept_once(study: optuna.Study) -> None:
    for versions in (OLD, NOW, OLD, {**OLD, "torch": "1.9.2"}, NOW, NOW):
        metadata(versions).save(study)
    about = RunMetadata.load(study)
    assert about is not None and about.versions == NOW
    assert about.earlier_versions == (OLD, {**OLD, "torch": "1.9.2"})


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        (NOW, []),
        ({**NOW, "torch": ".".join([*torch.__version__.split(".")[:2], "99"])}, []),
        ({**NOW, "torch": "1.9.1"}, ["torch 1.9"]),
        ({**NOW, "transformers": "4.2.0", "python": "2.7"}, ["transformers 4.2"]),
        ({**NOW, "heretic": f"{__version__}.9"}, [f"heretic {__version__}.9"]),
        ({"torch": "1.9.1"}, ["torch 1.9"]),
        ({}, []),
    ],
)
def test_what_can_change_measurements_is_named(study: optuna.Study, versions: dict[str, str], named: list[str]) -> None:
    assert not warnings(study), "a new study"
    metadata(versions).save(study)
    found = warnings(study)
    assert len(found) == bool(named) and all(text in found[0] for text in named)


def test_metadata_of_a_newer_version_are_read_and_damaged_ones_made_anew(study: optuna.Study) -> None:
    metadata(OLD).save(study)
    store(study, of_later={"a": 1})
    assert RunMetadata.load(study) == metadata(OLD) and len(warnings(study)) == 1
    store(study, layers="many")
    assert not warnings(study)
    metadata(NOW).save(study)
    assert RunMetadata.load(study) == metadata(NOW)
