"""What lies in a run's folder is its owner's only, and nothing is written through a link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from heretic.errors import UserError
from heretic.run_folder import RunFolder, log_to


def test_a_runs_folder_is_private_whatever_the_umask() -> None:
    before = os.umask(0)
    try:
        RunFolder(Path("runs/mine")).create()
        log_to(Path("runs/mine/run.log")).close()
    finally:
        os.umask(before)
    assert Path("runs/mine").stat().st_mode & 0o777 == 0o700
    assert Path("runs/mine/run.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["run.log", "study.db", "config.toml", "judge.jsonl"])
def test_a_link_among_the_runs_files_is_refused(name: str) -> None:
    Path("mine").write_text("kept")
    folder = RunFolder(Path("runs/mine"))
    folder.create()
    Path("runs/mine", name).symlink_to(Path("mine").resolve())
    with pytest.raises(UserError) as refused:
        folder.create()
    assert refused.value.code == "link-in-run-folder" and name in refused.value.what
    assert Path("mine").read_text() == "kept"


def test_two_runs_set_aside_in_the_same_second_are_both_kept() -> None:
    folder, kept = RunFolder(Path("runs/mine")), set()
    for number in range(3):
        folder.create()
        Path("runs/mine/which").write_text(str(number))
        aside = folder.set_aside()
        assert aside is not None
        kept.add(aside)
    assert sorted(p.joinpath("which").read_text() for p in kept) == ["0", "1", "2"]
