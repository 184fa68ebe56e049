"""Exports into a folder that holds something: refused, replaced, and what the user put there is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heretic.errors import UserError
from heretic.export import destination
from heretic.export.destination import check_destination, check_unchanged, commit, not_moved, staging_dir
from heretic.files import sha256
from heretic.interrupt import StopSignal
from heretic.progress import NULL_REPORTER
from tests.helpers.reporters import RecordingReporter


def export(folder: Path, files: dict[str, str]) -> Path:
    """A folder as an export of the run `mine` leaves it."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    named = {name: sha256(folder / name) for name in files}
    (folder / "manifest.json").write_text(json.dumps({"made_with": "heretic", "run": "mine", "files": named}))
    return folder


def replace(files: dict[str, str]) -> None:
    """A second export into `out`."""
    place = Path("out").resolve()
    check_destination(place, "mine")
    check_unchanged(place, StopSignal())
    commit(export(staging_dir(place), files), place, NULL_REPORTER)
    assert not list(Path().glob(".out*"))


def contents() -> dict[str, str]:
    return {
        p.relative_to("out").as_posix(): p.read_text()
        for p in Path("out").rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }


@pytest.fixture(params=["linked", "copied", "renamed"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems with hard links, without them, and without the exchange of names."""

    def refuse(*_: object) -> None:
        raise OSError("not supported")

    if request.param == "copied":
        monkeypatch.setattr("os.link", refuse)
    if request.param == "renamed":
        monkeypatch.setattr(destination, "atomic_swap", lambda one, other: False)


def test_added_files_are_kept_and_the_earlier_export_goes(how: None) -> None:
    out = export(Path("out"), {"model.safetensors": "1", "old.txt": "1", "heretic/d": "1"})
    (out / "notes.txt").write_text("mine")
    (out / "sub/deep").mkdir(parents=True)
    (out / "sub/deep/x").write_text("mine too")
    (out / "empty").mkdir()
    (out / "link").symlink_to("/nowhere")
    replace({"model.safetensors": "2", "heretic/d": "2"})
    assert contents() == {"model.safetensors": "2", "heretic/d": "2", "notes.txt": "mine", "sub/deep/x": "mine too"}
    assert (out / "empty").is_dir() and (out / "link").readlink() == Path("/nowhere")


def test_added_file_with_the_name_of_a_new_one_is_kept_under_another(how: None) -> None:
    export(Path("out"), {"model.safetensors": "1"})
    Path("out/LICENSE").write_text("mine")
    Path("out/same").write_text("2")
    replace({"model.safetensors": "2", "LICENSE": "theirs", "same": "2"})
    kept = {"model.safetensors": "2", "LICENSE": "theirs", "LICENSE.kept": "mine", "same": "2"}
    assert contents() == kept
    Path("out/NOTICE").write_text("mine")
    replace({"model.safetensors": "3", "LICENSE": "theirs", "NOTICE": "theirs", "LICENSE.kept": "new"})
    assert contents()["LICENSE.kept"] == "new" and contents()["LICENSE.kept.kept"] == "mine"
    assert contents()["NOTICE.kept"] == "mine"


def test_edited_card_is_kept_beside_the_new_one() -> None:
    export(Path("out"), {"README.md": "1"})
    Path("out/README.md").write_text("mine")
    check_destination(Path("out"), "mine")
    replace({"README.md": "2"})
    assert contents() == {"README.md": "2", "README.md.kept": "mine"}


@pytest.mark.parametrize("name", ["LICENSE", "large"])
def test_edited_file_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination, "QUICKLY_HASHED", 10)
    out = export(Path("out"), {"LICENSE": "1", "large": "1" * 20})
    (out / name).write_text("2" * len((out / name).read_text()))
    with pytest.raises(UserError) as error:
        replace({"LICENSE": "3"})
    assert error.value.code == "destination-edited" and name in error.value.what
    assert contents()[name].startswith("2")


def test_link_in_the_place_of_a_file_is_refused() -> None:
    out = export(Path("out"), {"README.md": "1"})
    Path("elsewhere").write_text("1")
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(Path("elsewhere").resolve())
    with pytest.raises(UserError) as error:
        check_destination(out, "mine")
    assert error.value.code == "destination-edited"


def test_deleted_file_is_no_obstacle() -> None:
    export(Path("out"), {"README.md": "1", "model": "1"})
    Path("out/model").unlink()
    replace({"model": "2"})
    assert contents() == {"model": "2"}


MANIFESTS: list[Any] = [
    {}, [], {"run": "mine", "files": {}}, {"made_with": "heretic", "run": "other", "files": {}},
    {"made_with": "heretic", "run": "mine"}, {"made_with": "heretic", "run": "mine", "files": {"../x": "0" * 64}},
    {"made_with": "heretic", "run": "mine", "files": {"/etc/x": "0" * 64}}, {"note": '"run": "mine"'},
]  # fmt: skip


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_folder_that_is_no_export_of_the_run_is_refused(manifest: Any) -> None:
    Path("out").mkdir()
    Path("out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        check_destination(Path("out"), "mine")
    assert error.value.code == "destination-not-ours"


def test_a_mount_point_is_refused_before_anything_is_written() -> None:
    Path("link").symlink_to("/proc")
    for place in ("/proc", "link"):
        with pytest.raises(UserError) as error:
            check_destination(Path(place), "mine")
        assert error.value.code == "destination-mount-point"


def test_a_finished_export_that_cannot_be_moved_is_kept_beside_its_destination() -> None:
    Path("out-2").mkdir()
    place = Path("out").resolve()
    partial = export(staging_dir(place), {"model": "whole"})
    error = not_moved(OSError(16, "Device or resource busy"), partial, place)
    assert error.code == "export-not-moved" and error.where == str(Path("out-3").resolve())
    assert (Path("out-3") / "model").read_text() == "whole" and not partial.exists()


@pytest.mark.parametrize("swaps", [True, False])
def test_an_export_in_its_place_is_a_success_whatever_is_left_of_the_earlier_one(
    swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace({"model": "old"})
    place, reporter = Path("out").resolve(), RecordingReporter()
    partial = export(staging_dir(place), {"model": "new"})
    if not swaps:
        monkeypatch.setattr(destination, "atomic_swap", lambda one, other: False)

    def fails(path: Path) -> None:
        if path == place.parent:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(destination, "fsync", fails)
    commit(partial, place, reporter)
    assert contents() == {"model": "new"} and len(reporter.warnings) == 1


def test_the_earlier_export_comes_back_if_the_new_one_cannot_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    replace({"model": "old"})
    place = Path("out").resolve()
    partial = export(staging_dir(place), {"model": "new"})
    monkeypatch.setattr(destination, "atomic_swap", lambda one, other: False)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self == partial:
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError):
        commit(partial, place, NULL_REPORTER)
    assert contents() == {"model": "old"} and (partial / "model").read_text() == "new"
