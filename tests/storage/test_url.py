"""URLs of storages."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.errors import UserError
from heretic.storage.url import sqlite_file, storage_url


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


def test_a_folder_that_a_url_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        storage_url("", tmp_path / "try?1")
    assert refused.value.code == "invalid-run-path"
    assert storage_url("postgresql://h/d?a=b", tmp_path / "try?1") == "postgresql://h/d?a=b"
