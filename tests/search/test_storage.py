"""URLs of storages."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.search.storage import sqlite_file


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
