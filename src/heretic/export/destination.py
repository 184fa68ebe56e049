"""The destination folder of an export: what may be replaced, what is kept, and the atomic replacement."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from heretic.errors import UserError
from heretic.export.manifest import MANIFEST, read_inventory
from heretic.files import atomic_swap, expand_user, fsync, sha256
from heretic.hardware.host import existing_parent, is_mount_point
from heretic.interrupt import StopSignal
from heretic.model.repository import CARD
from heretic.progress import ProgressReporter

QUICKLY_HASHED = 16 << 20  # bytes; larger files are hashed only once, before the export
NAMED = 3  # files in a message


def check_destination(destination: Path, owner: str) -> None:
    """Raise UserError unless the destination is new, empty, or an unedited export of the run `owner`.

    Files added to an earlier export and an edited card are allowed, and kept. Only small files are hashed.
    """
    destination = expand_user(destination)
    if not destination.resolve().name:
        raise UserError(
            "The destination is the root of a file system.",
            code="destination-root",
            where=str(destination),
            fix="name a new folder",
        )
    if is_mount_point(destination):  # as in docker run -v FOLDER:/out
        raise UserError(
            "The destination is a mount point, which heretic cannot replace by the finished export.",
            code="destination-mount-point",
            where=str(destination),
            fix=f"name a folder in it: {destination / 'model'}",
        )
    if not (parent := existing_parent(destination)).is_dir() and parent != destination.absolute():
        raise UserError(
            f"{parent} is a file, not a folder.",
            code="destination-not-writable",
            where=str(destination),
            fix="name a folder in a folder",
        )
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    files = _files_of(destination, owner)
    if files is None:
        raise UserError(
            "The destination exists and was not written by this run, so heretic does not replace it.",
            code="destination-not-ours",
            where=str(destination),
            fix="choose another folder, or move this one away",
        )
    _refuse_edited(destination, [n for n in files if _edited(destination, n, files, QUICKLY_HASHED)])


def check_unchanged(destination: Path, stop: StopSignal) -> None:
    """Raise UserError if any file of an earlier export differs from its manifest. Raises Interrupted between files."""
    inventory = read_inventory(destination)
    edited = []
    for name in inventory.files if inventory else ():
        stop.check()
        if inventory and _edited(destination, name, inventory.files):
            edited.append(name)
    _refuse_edited(destination, edited)


def staging_dir(destination: Path) -> Path:
    """Create an empty staging folder beside the destination, and clean up after killed processes.

    An earlier export that a killed process had moved away is moved back. Raises UserError.
    """
    for leftover in sorted(destination.parent.glob(f".{destination.name}.partial-*")):
        process = leftover.name.rpartition("-")[2]
        # This process has not staged yet: in a container it often gets the number of the killed one.
        if process.isdigit() and int(process) != os.getpid() and psutil.pid_exists(int(process)):
            continue
        if leftover.name.startswith(f".{destination.name}.partial-old-") and not destination.exists():
            leftover.rename(destination)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"The destination is not writable: {error.strerror or error}.",
            code="destination-not-writable",
            where=str(destination),
            fix="choose a writable folder",
        ) from None
    return partial


def commit(partial: Path, destination: Path, reporter: ProgressReporter) -> None:
    """Move the finished folder to the destination, replacing an earlier export but keeping the user's files.

    The replacement is atomic where the system can swap two names. Elsewhere there are two renames, and `staging_dir` recovers the
    earlier export after a crash between them.
    """
    old = destination.with_name(f".{destination.name}.partial-old-{os.getpid()}")
    kept = _keep_user_files(destination, partial) if destination.exists() else []
    for file in (*partial.rglob("*"), partial):
        if not file.is_symlink():
            fsync(file)
    _place(partial, destination, old)
    try:
        if partial.exists():  # the earlier export, after a swap
            partial.rename(old)
        fsync(destination.parent)
        if old.exists():
            kept += _keep_user_files(old, destination)  # files added in the meantime
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        left = old if old.exists() else partial
        reporter.warning(f"The export is in place, but files of the earlier one are left in {left}: {error}")
    if kept:
        reporter.info(f"Kept files in {destination} that the earlier export did not write: {abbreviated(kept)}.")


def _place(partial: Path, destination: Path, old: Path) -> None:
    """Give the finished folder its name; an earlier export is then in `partial` or `old`. Raises OSError if nothing has changed."""
    if not destination.exists():
        partial.rename(destination)
    elif not atomic_swap(partial, destination):
        destination.rename(old)
        try:
            partial.rename(destination)
        except OSError:
            old.rename(destination)
            raise


def not_moved(error: OSError, partial: Path, destination: Path) -> UserError:
    """Return the UserError for a finished export that `commit` could not move; it is kept under another name if possible."""
    kept = partial
    names = (destination.with_name(f"{destination.name}-{number}") for number in range(2, 100))
    with contextlib.suppress(OSError, StopIteration):
        free = next(name for name in names if not os.path.lexists(name))
        kept = partial.rename(free)
    return UserError(
        f"The export is complete, but cannot be moved to {destination}: {error.strerror or error}.",
        code="export-not-moved",
        where=str(kept),
        fix="move this folder yourself",
    )


def disk_error(error: Exception, partial: Path) -> UserError:
    """Return the UserError for a failed write."""
    return UserError(
        f"The model cannot be written: {error}",
        code="disk",
        where=str(partial.parent),
        fix="free disk space, then run the same command again, or heretic export; the study is kept",
    )


def _files_of(folder: Path, owner: str) -> Mapping[str, str] | None:
    """Files and hashes in the manifest of the run's earlier export; None if the folder is not one."""
    inventory = read_inventory(folder)
    return inventory.files if inventory and inventory.run == owner else None


def _edited(folder: Path, name: str, files: Mapping[str, str], largest: int | None = None) -> bool:
    """Whether a file exists and differs from the manifest; files above `largest` bytes are not hashed."""
    file = folder / name
    if file.is_symlink():
        return True
    if not file.is_file() or (largest is not None and file.stat().st_size > largest):
        return False
    return sha256(file) != files[name]


def _refuse_edited(destination: Path, names: list[str]) -> None:
    names = [name for name in names if name != CARD or (destination / name).is_symlink()]  # users may edit the card
    if names:
        raise UserError(
            f"Files in the destination were changed after the export: {abbreviated(names)}.",
            code="destination-edited",
            where=str(destination),
            fix="move them away or delete them, or choose another folder",
        )


def _keep_user_files(earlier: Path, new: Path) -> list[str]:
    """Hard-link the files of an earlier export that its manifest does not cover into the new folder; returns their names.

    Links, not moves: nothing is lost if the process ends.
    """
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
    """Files, links and empty folders, by relative path; links are not followed."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(place) / name).relative_to(folder).as_posix()
        if not folders and not files and Path(place) != folder:
            yield Path(place).relative_to(folder).as_posix()


def _same(first: Path, second: Path) -> bool:
    """Whether two paths are the same file, link, folder or content."""
    if first.is_symlink() or second.is_symlink():
        return first.is_symlink() and second.is_symlink() and os.readlink(first) == os.readlink(second)
    if first.is_dir() or second.is_dir():
        return first.is_dir() and second.is_dir()
    return first.samefile(second) or (first.stat().st_size == second.stat().st_size and sha256(first) == sha256(second))


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


def abbreviated(names: Sequence[str], shown: int = NAMED) -> str:
    """Join the first names for a message, and say how many follow."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"
