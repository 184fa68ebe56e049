"""Files that are either whole or not there: written beside and renamed into place, hashed, and checked when read."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from heretic.errors import UserError, first_line

SEAL, AFTER_SEAL = "# sha256 of the lines above: ", "; delete this line after a change by hand"


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with _no_space_left(path):
        beside.write_text(text, encoding="utf-8")
        _settle(beside, path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in the same way; its metadata holds a hash of the tensors' bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with _no_space_left(path):
        kept = dict(metadata or {})
        save_file(tensors, beside, metadata={**kept, "sha256": _digest(tensors, kept)})
        sort_metadata(beside)
        _settle(beside, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata that `write_tensors` wrote. Raises UserError when the content is not what was written."""
    from safetensors import safe_open

    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise UserError(
            f"{path.name} is not a regular file.",
            code="damaged-file",
            where=str(path),
            fix="delete it; heretic makes it again",
        )
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path.name} is damaged: {first_line(error)}",
            code="damaged-file",
            where=str(path),
            fix="delete it; heretic makes it again",
        ) from None
    if metadata.get("sha256") != _digest(tensors, metadata):
        raise UserError(
            f"{path.name} is damaged: its content does not match its hash.",
            code="damaged-file",
            where=str(path),
            fix="delete it; heretic makes it again",
        )
    return tensors, metadata


def sealed(text: str) -> str:
    """A text file's lines and, as its last one, a comment with their hash."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}{AFTER_SEAL}\n"


def check_seal(path: Path) -> None:
    """Raise UserError if a text file that was sealed is not what was written; one without a seal is believed."""
    try:
        content = path.read_bytes()
    except OSError:
        return  # who reads it next says so
    text, seal, given = content.rpartition(SEAL.encode())
    if seal and given != f"{hashlib.sha256(text).hexdigest()}{AFTER_SEAL}\n".encode():
        raise UserError(
            f"{path.name} is not what heretic wrote: it is damaged, or was changed by hand.",
            where=str(path),
            fix="put back a copy of it; if it is as you want it, delete its last line, which holds the hash of the others",
        )


def expanded(path: str | Path) -> Path:
    """A path with ~ for the home folder put in; one of a user who is not known stays as it is, where pathlib raises."""
    return Path(os.path.expanduser(path))


def file_place(path: Path) -> Path:
    """The path of a file that is to be written, with its folder made. Raises UserError for what can be no file."""
    path = expanded(path)
    if path.is_dir():
        raise UserError(
            "This is a folder, and a file is to be written.", where=str(path), fix="name a file, in it or elsewhere"
        )
    make_folder(path.parent, "The folder for the file", fix="name a file in a folder that can be written")
    return path


def make_folder(path: Path, what: str, *, fix: str) -> None:
    """Make a folder and those above it. Raises UserError, with `what` it was to be and how to `fix` it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what} cannot be made: {error.strerror or error}.", where=str(path), fix=fix) from None


def sort_metadata(path: Path) -> None:
    """Give a safetensors file the same bytes every time: its library writes the metadata in an order of chance."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if len(header.get("__metadata__", {})) < 2:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # longer only where the two libraries write a character in different ways
            file.seek(8)
            file.write(text.ljust(size))


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def to_disk(path: Path) -> None:
    """Have a file's content, or a folder's names, written through to the disk, so that they outlast a loss of power."""
    if path.is_dir():
        with contextlib.suppress(OSError):  # some systems and network disks do not do this for folders
            _sync(path)
    else:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Give each of two existing paths the other's name, in one step that is done or not done; False where that is not to be had.

    renameat2 with RENAME_EXCHANGE of Linux (renameat2(2)), renamex_np with RENAME_SWAP of macOS (rename(2) there).
    """
    names = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, 2) == 0)
        here = -100  # AT_FDCWD: paths are as the process sees them
        return bool(library.renameat2(here, names[0], here, names[1], 2) == 0)
    except (OSError, AttributeError, TypeError):  # another system, or an old C library
        return False


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in metadata.items() if k != "sha256")).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().numpy().tobytes())
    return digest.hexdigest()


def _settle(beside: Path, path: Path) -> None:
    to_disk(beside)
    os.replace(beside, path)


class _no_space_left:
    """Turns a failed write into an error that names the place; leaves no partial file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            return
        with contextlib.suppress(OSError):  # on a read-only disk even this fails
            self.path.with_name(f".{self.path.name}.{os.getpid()}").unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(
                f"{self.path.name} cannot be written: {error}",
                where=str(self.path.parent),
                fix="make room or check the permissions, then run the same command again; nothing finished is lost",
            ) from None
