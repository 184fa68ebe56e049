"""URLs of storages."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy

from heretic.errors import UserError
from heretic.storage.rdb import connect
from heretic.storage.url import sqlite_file, storage_url, with_file


@pytest.mark.parametrize(
    "url, file",
    [
        ("sqlite:///study.db", "study.db"),
        ("sqlite:////a b/study.db?timeout=3", "/a b/study.db"),
        ("sqlite:///file:/a/study.db?uri=true&mode=ro", "/a/study.db"),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("postgresql://me@host/studies", None),
        ("no url", None),
    ],
)
def test_the_file_of_a_storage(url: str, file: str | None) -> None:
    assert sqlite_file(url) == (Path(file) if file else None)


@pytest.mark.parametrize("name", ["q%34", "a ?b", "{x}", "{SCHEMA_VERSION}", "50%", "ü#'\"&;"])
def test_a_study_stays_in_a_folder_of_any_name_or_it_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    try:
        url = storage_url("", folder)
    except UserError as error:  # SQLAlchemy 2.0 takes no escapes
        assert error.code == "invalid-run-path" and set("%?{}") & set(name) and sqlalchemy.__version__ < "2.1"
        return
    connect(url)
    assert sqlite_file(url) == folder / "study.db" and (folder / "study.db").stat().st_size > 0
    assert list((tmp_path / "runs").iterdir()) == [folder]


def test_a_storage_of_the_settings_stays_as_it_is(tmp_path: Path) -> None:
    assert storage_url("postgresql://h/d?a=b", tmp_path / "try?1") == "postgresql://h/d?a=b"


@pytest.mark.parametrize(
    "url",
    ["sqlite:///./s.db", "sqlite:///s.db?timeout=3", "sqlite+pysqlite:///s.db", "sqlite:///file:s.db?uri=true&mode=rw"],
)
def test_a_storage_keeps_its_options_with_another_file(url: str) -> None:
    moved = with_file(url, "/a b/s.db")
    assert sqlite_file(moved) == Path("/a b/s.db")
    before, after = sqlalchemy.make_url(url), sqlalchemy.make_url(moved)
    assert after.query == before.query and after.drivername == before.drivername
    try:
        assert sqlite_file(with_file(url, "/{x}/s.db")) == Path("/{x}/s.db")
    except UserError as error:
        assert error.code == "invalid-run-path" and sqlalchemy.__version__ < "2.1"
