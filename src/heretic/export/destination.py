"""The folder that an export goes to: what it may replace there, what it keeps, and how the new one takes its place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from heretic.errors import UserError
from heretic.export.manifest import MANIFEST, read_inventory
from heretic.files import atomic_swap, expand_user, fsync, sha256
from heretic.interrupt import StopSignal
from heretic.model.repository import CARD
from heretic.progress import ProgressReporter

QUICKLY_HASHED = 16 << 20  # bytes; larger files are hashed once, before the export begins
NAMED = 3  # files in a message


def check_destination(destination: Path, owner: str) -> None:
    """Refuse a folder that holds something other than an earlier export of the run `owner`, or an export whose small files were
    edited. Files that were added to an export, and a card that was edited, are no obstacle: they are kept. Raises UserError."""
    destination = expand_user(destination)
    if not destination.resolve().name:
        raise UserError(
            "The destination is not a folder of its own.",
            code="destination-root",
            where=str(destination),
            fix="name a new folder",
        )
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    files = _files_of(destination, owner)
    if files is None:
        raise UserError(
            "The destination exists and was not written by this run, so it is left as it is.",
            code="destination-not-ours",
            where=str(destination),
            fix="name another folder, or move this one away",
        )
    _refuse_edited(destination, [n for n in files if _edited(destination, n, files, QUICKLY_HASHED)])


def check_unchanged(destination: Path, stop: StopSignal) -> None:
    """Refuse an earlier export of which any file, however large, is not what its manifest names. Raises UserError, Interrupted."""
    inventory = read_inventory(destination)
    edited = []
    for name in inventory.files if inventory else ():
        stop.check()
        if inventory and _edited(destination, name, inventory.files):
            edited.append(name)
    _refuse_edited(destination, edited)


def staging_dir(destination: Path) -> Path:
    """Make a new, empty folder beside the destination. Leftovers of a killed process are removed, but for an earlier export that it
    had moved away and not yet replaced: that one gets its name again."""
    for left in sorted(destination.parent.glob(f".{destination.name}.partial-*")):
        process = left.name.rpartition("-")[2]
        # Of this process nothing is under way yet: in a container the next one often has the number of the one that was killed.
        if process.isdigit() and int(process) != os.getpid() and psutil.pid_exists(int(process)):
            continue
        if left.name.startswith(f".{destination.name}.partial-old-") and not destination.exists():
            left.rename(destination)
        else:
            shutil.rmtree(left, ignore_errors=True)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"The destination cannot be written: {error.strerror or error}",
            code="destination-not-writable",
            where=str(destination),
            fix="name a folder that can be written",
        ) from None
    return partial


def commit(partial: Path, destination: Path, reporter: ProgressReporter) -> None:
    """Put the finished folder in its place; an earlier export of the same run gives way only now, with what was added to it kept.

    Where the system can exchange two names at once there is no moment without a model under this name. Elsewhere there is an
    instant between two renames, after which `partial_folder` would put the earlier one back.
    """
    old = destination.with_name(f".{destination.name}.partial-old-{os.getpid()}")
    kept = _keep_user_files(destination, partial) if destination.exists() else []
    for file in (*partial.rglob("*"), partial):
        if not file.is_symlink():
            fsync(file)
    if not destination.exists():
        partial.rename(destination)
    elif atomic_swap(partial, destination):
        partial.rename(old)
    else:
        destination.rename(old)
        partial.rename(destination)
    fsync(destination.parent)
    if old.exists():
        kept += _keep_user_files(old, destination)  # what came in the meantime
        shutil.rmtree(old, ignore_errors=True)
    if kept:
        reporter.info(f"Kept in {destination}, as the earlier export had not written it: {_some(kept)}.")


def disk_error(error: Exception, partial: Path) -> UserError:
    """A failed write in words."""
    return UserError(
        f"The model cannot be written: {error}",
        code="disk",
        where=str(partial.parent),
        fix="make room, then run the same command again or heretic export; the study is complete and kept",
    )


def _files_of(folder: Path, owner: str) -> Mapping[str, str] | None:
    """What the manifest of a run's earlier export names; None where the folder is none."""
    inventory = read_inventory(folder)
    return inventory.files if inventory and inventory.run == owner else None


def _edited(folder: Path, name: str, files: Mapping[str, str], largest: int | None = None) -> bool:
    """Whether a file is there and is another one than the manifest names."""
    file = folder / name
    if file.is_symlink():
        return True
    if not file.is_file() or (largest is not None and file.stat().st_size > largest):
        return False
    return sha256(file) != files[name]


def _refuse_edited(destination: Path, names: list[str]) -> None:
    names = [name for name in names if name != CARD or (destination / name).is_symlink()]  # people edit the card
    if names:
        raise UserError(
            f"The destination holds files that were changed after the export: {_some(names)}.",
            code="destination-edited",
            where=str(destination),
            fix="move them away if you need them, else delete them; or name another folder",
        )


def _keep_user_files(earlier: Path, new: Path) -> list[str]:
    """Give everything in an earlier export that its manifest does not name, or names with another hash, a place in the new folder
    as well; its names. Files are linked, so that nothing is lost whenever the process ends."""
    inventory = read_inventory(earlier)
    files = inventory.files if inventory else {}
    kept = []
    for name in _names_in(earlier):
        source = earlier / name
        if name == MANIFEST or (name in files and not _edited(earlier, name, files, QUICKLY_HASHED)):
            continue
        target = new / name
        number = 0
        while os.path.lexists(target) and not _same(source, target):
            number += 1
            target = new / f"{name}.kept{'' if number == 1 else f'-{number}'}"
        if os.path.lexists(target):
            continue
        _link(source, target)
        kept.append(target.relative_to(new).as_posix())
    return kept


def _names_in(folder: Path) -> Iterator[str]:
    """Files, links and empty folders, by their path from the folder; links are not followed."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(place) / name).relative_to(folder).as_posix()
        if not folders and not files and Path(place) != folder:
            yield Path(place).relative_to(folder).as_posix()


def _same(one: Path, other: Path) -> bool:
    """Whether two names stand for the same file, link, folder or content."""
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and os.readlink(one) == os.readlink(other)
    if one.is_dir() or other.is_dir():
        return one.is_dir() and other.is_dir()
    return one.samefile(other) or (one.stat().st_size == other.stat().st_size and sha256(one) == sha256(other))


def _link(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        os.symlink(os.readlink(source), target)
        return
    with contextlib.suppress(OSError):  # some file systems have no hard links
        os.link(source, target)
        return
    shutil.copy2(source, target)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
