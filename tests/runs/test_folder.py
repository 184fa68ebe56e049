"""What lies in a run's folder is its owner's only, and nothing is written through a link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from heretic.ablation.directions import Directions
from heretic.errors import UserError
from heretic.files import write_tensors, write_text
from heretic.pipeline.prepare import check_storage
from heretic.runs.folder import RunFolder, log_to
from heretic.settings import Settings
from heretic.storage.rdb import open_study
from heretic.storage.url import storage_url


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
        aside = folder.archive()
        assert aside is not None
        kept.add(aside)
    assert sorted(p.joinpath("which").read_text() for p in kept) == ["0", "1", "2"]


def mode(path: str) -> int:
    return Path(path).stat().st_mode & 0o777


def test_files_of_a_run_are_its_owners_and_exports_follow_the_umask() -> None:
    folder = RunFolder(Path("runs/mine"))
    before = os.umask(0)
    try:
        folder.create()
        folder.save_directions(Directions(torch.ones(1, 2)))
        write_text(folder.path / "config.toml", "", private=True)
        open_study(storage_url("", folder.path), "heretic", {})
        write_text(Path("exported.json"), "{}")
        write_tensors(Path("exported.safetensors"), {"a": torch.ones(1)})
        os.umask(0o027)
        write_tensors(Path("adapter.safetensors"), {"a": torch.ones(1)})
    finally:
        os.umask(before)
    files = {p for p in folder.path.rglob("*") if p.is_file()}
    assert {"study.db", "config.toml", "directions.safetensors"} <= {p.name for p in files}
    assert {mode(str(p)) for p in files} == {0o600}
    assert mode("runs") == 0o755 and mode("runs/mine") == 0o700
    assert (mode("exported.json"), mode("exported.safetensors"), mode("adapter.safetensors")) == (0o666, 0o666, 0o640)


def test_what_is_written_replaces_a_link_and_follows_none() -> None:
    Path("mine").write_text("kept")
    for name in ("text.json", f".text.json.{os.getpid()}"):
        Path(name).symlink_to("mine")
    write_text(Path("text.json"), "new")
    assert (Path("mine").read_text(), Path("text.json").read_text()) == ("kept", "new")
    assert not Path("text.json").is_symlink() and not list(Path().glob(".text*"))


def test_links_beside_the_folder_of_runs_do_not_matter() -> None:
    Path("mine").write_text("kept")
    Path("link").symlink_to("mine")
    check_storage(Settings(runs_dir="runs"))
    check_storage(Settings(runs_dir="."))
