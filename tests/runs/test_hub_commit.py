"""A run of a hub model, after the hub has a newer commit of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from heretic import load
from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.runs.folder import load_run_settings, load_settings
from heretic.runs.hub_commit import known_commits
from heretic.settings.sources import Resolved, resolve

FIRST, SECOND = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of owner/tiny, `main` naming the first one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stored = tmp_path / "hub/models--owner--tiny"
    shutil.copytree(llama, stored / "snapshots" / FIRST)
    shutil.copytree(llama, stored / "snapshots" / SECOND)
    with (stored / "snapshots" / SECOND / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text(FIRST)
    return stored


def resolved(config: Path, **changes: object) -> Resolved:
    return resolve(config, {"model": "owner/tiny", "n_trials": 1, **changes})


@pytest.mark.parametrize("name", ["mine", ""])
def test_a_run_goes_on_with_the_commit_that_it_began_with(config: Path, hub: Path, name: str) -> None:
    first = run(resolved(config, run_name=name), reporter=NULL_REPORTER, stop=StopSignal())
    assert load_settings(first.folder, {}).revision == FIRST
    (hub / "refs/main").write_text(SECOND)
    second = run(resolved(config, run_name=name, n_trials=2), reporter=NULL_REPORTER, stop=StopSignal())
    assert second.folder.path == first.folder.path and len(second.results) == 2
    again = run(load_run_settings(second.folder, {}), fresh=True, reporter=NULL_REPORTER, stop=StopSignal())
    assert load_settings(again.folder, {}).revision == SECOND
    fresh = run(resolved(config, run_name=name), fresh=True, reporter=NULL_REPORTER, stop=StopSignal())
    assert load_settings(fresh.folder, {}).revision == SECOND and len(fresh.results) == 1


def test_another_run_begins_with_the_newest_commit(config: Path, hub: Path) -> None:
    outcome = run(resolved(config, run_name="mine"), reporter=NULL_REPORTER, stop=StopSignal())
    (hub / "refs/main").write_text(SECOND)
    for changes in ({}, {"run_name": "other"}, {"seed": 5}):
        other = run(resolved(config, **changes), reporter=NULL_REPORTER, stop=StopSignal())
        assert load_settings(other.folder, {}).revision == SECOND, "what is in the run `mine` is not continued here"
    assert load_run_settings(outcome.folder, {}, {"model": "owner/other"}).settings.revision == ""
    assert load_run_settings(outcome.folder, {}, {"n_trials": 5}).settings.revision == FIRST
    for given in ({"revision": "main"}, {"model": "owner/other"}):
        assert known_commits(resolved(config, **given).settings) == []


def test_python_and_other_machines_go_on_with_that_commit_too(config: Path, hub: Path, tmp_path: Path) -> None:
    shared = {"run_name": "mine", "storage": f"sqlite:///{tmp_path}/shared.db"}
    run(resolved(config, **shared), reporter=NULL_REPORTER, stop=StopSignal())
    (hub / "refs/main").write_text(SECOND)
    elsewhere = run(
        resolved(config, **shared, runs_dir="elsewhere", n_trials=2), reporter=NULL_REPORTER, stop=StopSignal()
    )
    assert len(elsewhere.results) == 2
    with load("owner/tiny", config=config, **shared, n_trials=2) as session:
        assert session.settings.revision == FIRST and session.trial(1)
