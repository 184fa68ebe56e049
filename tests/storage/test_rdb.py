"""Opening a storage."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from filelock import FileLock

from heretic.errors import StudyMismatch, UserError
from heretic.storage import rdb
from heretic.storage import study_lock as study_lock_module
from heretic.storage.rdb import connect, open_study
from tests.helpers.errors import raises
from tests.helpers.postgres import PASSWORD, Server


def test_several_open_a_new_database_at_once(postgres: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        storages = list(pool.map(lambda _: connect(postgres.url), range(8)))
    assert [storage.get_all_studies() for storage in storages] == [[]] * 8


def test_who_makes_the_tables_is_waited_for_and_not_for_ever(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdb, "BUSY_TIMEOUT", 1)
    postgres.ask("create database anew")
    url = postgres.url.removesuffix("/study") + "/anew"
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(f"select pg_advisory_lock({rdb.TABLES_LOCK_KEY})")
        with raises("storage-unavailable"):
            connect(url)
        other.execute(f"select pg_advisory_unlock({rdb.TABLES_LOCK_KEY})")
        connect(url)
        other.execute(f"select pg_advisory_lock({rdb.TABLES_LOCK_KEY})")
        connect(url)  # the tables are there, so nobody waits


def test_a_worker_with_other_versions_or_other_weights_is_refused(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"format": 1, "model": {"sha256": {"model.safetensors": "aa"}}}
    open_study(postgres.url, "shared", facts)
    open_study(postgres.url, "shared", facts)
    with raises("study-mismatch", StudyMismatch) as error:
        open_study(postgres.url, "shared", {**facts, "model": {"sha256": {"model.safetensors": "bb"}}})
    assert all(value in error.value.what for value in ("model.safetensors", "aa", "bb"))
    other = {**rdb.relevant_versions(), "torch": "1.0"}
    monkeypatch.setattr(rdb, "relevant_versions", lambda: other)
    with raises("study-mismatch", StudyMismatch) as error:
        open_study(postgres.url, "shared", facts)
    assert "torch" in error.value.what


def test_a_file_that_is_no_database_is_refused_at_once_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    url = f"sqlite:///{file}"
    for make in (Path.mkdir, os.mkfifo):
        make(file)
        with pytest.raises(UserError) as refused:
            connect(url)
        assert refused.value.code == "storage-unavailable"
        file.rmdir() if file.is_dir() else file.unlink()
    file.write_bytes(
        b"no database, but longer than a header of SQLite would be, which has a hundred bytes, so that it is read"
    )
    with pytest.raises(UserError) as refused:
        connect(url)
    assert refused.value.code == "storage-unavailable"


def test_the_database_of_another_program_gets_no_tables(tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("create table recipes (name text)")
        other.commit()
    before = file.read_bytes()
    with pytest.raises(UserError) as refused:
        connect(f"sqlite:///{file}")
    assert refused.value.code == "not-a-study" and file.read_bytes() == before


def test_a_study_of_an_older_optuna_is_kept_and_the_fix_upgrades_it(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    url = f"sqlite:///{folder / 'study.db'}"
    open_study(url, "s", {"a": 1})
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as stored:
        stored.executescript("update alembic_version set version_num = 'v3.0.0.d'")
    before = (folder / "study.db").read_bytes()
    with raises("study-version") as error:
        open_study(url, "s", {"a": 1})
    assert error.value.where == url and (folder / "study.db").read_bytes() == before
    assert error.value.fix and "--fresh" not in error.value.fix
    subprocess.run(error.value.fix, shell=True, check=True)
    open_study(url, "s", {"a": 1})
    assert (folder / "study.db.copy").read_bytes() == before


def test_a_study_of_a_newer_optuna_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    open_study(f"sqlite:///{file}", "s", {"a": 1})
    with contextlib.closing(sqlite3.connect(file)) as stored:
        stored.executescript("update alembic_version set version_num = 'v9.0.0.a'")
    before = file.read_bytes()
    with raises("study-version") as error:
        open_study(f"sqlite:///{file}", "s", {"a": 1})
    assert error.value.fix == "update optuna: pip install -U optuna" and file.read_bytes() == before


def test_the_upgrade_of_a_server_shows_no_password(postgres: Server) -> None:
    connect(postgres.url)
    postgres.ask("update alembic_version set version_num = 'v3.0.0.d'")
    with raises("study-version") as error:
        connect(postgres.url)
    assert PASSWORD not in str(error.value)
    assert postgres.url.replace(PASSWORD, "***").partition(":")[2] in (error.value.fix or "")


def test_a_database_that_stays_locked_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdb, "BUSY_TIMEOUT", 0.1)
    file = tmp_path / "study.db"
    open_study(f"sqlite:///{file}", "s", {"a": 1})
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("begin exclusive")
        with pytest.raises(UserError) as refused:
            open_study(f"sqlite:///{file}", "s", {"a": 1})
    assert refused.value.code == "storage-locked"
    open_study(f"sqlite:///{file}", "s", {"a": 1})


def test_a_turn_that_another_worker_keeps_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_lock_module, "LOCK_TIMEOUT", 0.1)
    file = tmp_path / "study.db"
    study = open_study(f"sqlite:///{file}", "s", {"a": 1})
    with FileLock(f"{file}.lock"), pytest.raises(UserError) as refused, study_lock_module.study_lock(study):
        raise AssertionError("two turns at once")
    assert refused.value.code == "storage-locked"
    with study_lock_module.study_lock(study):
        pass
