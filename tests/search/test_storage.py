"""URLs of storages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from heretic.search.storage import connect, sqlite_file
from tests.postgres import Server


@pytest.mark.parametrize(
    "url, file",
    [
        ("sqlite:///study.db", "study.db"),
        ("sqlite:////a b/study.db?timeout=3", "/a b/study.db"),
        ("sqlite:///file:/a/study.db?uri=true&mode=ro", "/a/study.db"),
        ("sqlite://", None),
        ("postgresql://me@host/studies", None),
        ("no url", None),
    ],
)
def test_the_file_of_a_storage(url: str, file: str | None) -> None:
    assert sqlite_file(url) == (Path(file) if file else None)


def test_several_open_a_new_database_at_once(postgres: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        storages = list(pool.map(lambda _: connect(postgres.url), range(8)))
    assert [storage.get_all_studies() for storage in storages] == [[]] * 8
