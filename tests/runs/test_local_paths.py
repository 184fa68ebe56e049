from __future__ import annotations

from pathlib import Path

import pytest

from heretic.runs.local_paths import with_absolute_paths, with_relative_paths
from heretic.settings.sources import read_toml, resolve


@pytest.mark.parametrize("storage", ["sqlite:///./s.db", "sqlite:///s.db?timeout=3", "sqlite+pysqlite:///s.db"])
def test_storage_and_artifacts_of_a_run_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    run = tmp_path / "runs/mine"
    for folder in (run, tmp_path / "else"):
        folder.mkdir(parents=True)
    (tmp_path / "s.db").touch()
    (run / "config.toml").write_text(f'storage = "{storage}"\nartifacts = "shared"\n')
    monkeypatch.chdir(tmp_path / "else")
    file = read_toml(Path("../runs/mine/config.toml"))
    found = with_absolute_paths(resolve(file), Path("../runs/mine"), file.values)
    assert str(tmp_path / "s.db") in found.settings.storage and found.settings.artifacts == str(tmp_path / "shared")
    assert ("timeout=3" in storage) == ("timeout=3" in found.settings.storage)
    kept = with_relative_paths(found, Path("../runs/mine")).settings
    assert str(tmp_path) not in kept.storage and kept.artifacts == "shared"
