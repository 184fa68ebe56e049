"""Read text files, whatever they hold; write files so that they are either whole or not there, with hashes."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from safetensors import SafetensorError

from heretic.errors import UserError, first_line

if TYPE_CHECKING:  # PyTorch takes seconds to import, and settings are read without it
    from torch import Tensor

LARGEST_TEXT = 256 << 20  # bytes of a text file that is read as a whole
# Windows alone has O_BINARY and lacks the others. O_NONBLOCK: opening a pipe that nobody writes to must not wait.
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK"))
_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)


def open_regular(
    path: Path, what: str = "The file", *, where: str | None = None, error: type[UserError] = UserError
) -> BinaryIO:
    """Open a regular file for reading; a pipe, a device or a folder is never opened.

    Args:
        path: the file; links are followed.
        what: what the file is, for messages, such as "The settings file".
        where: the setting that names the file; default: the path.
        error: the kind of error to raise, with code missing-file, unreadable-file or not-a-regular-file.
    """
    where = where or str(path)
    try:
        _refuse_special(os.stat(path).st_mode, path, what, where, error)
        handle = os.open(path, _READ)
    except FileNotFoundError:
        raise error(f"{what} {path} does not exist.", code="missing-file", where=where, fix="check the path") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL byte in the path
        cause = getattr(problem, "strerror", None) or problem
        raise error(
            f"{what} {path} cannot be read: {cause}.",
            code="unreadable-file",
            where=where,
            fix="check the path and its permissions",
        ) from None
    try:
        _refuse_special(os.fstat(handle).st_mode, path, what, where, error)  # it may have been replaced in between
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(
    path: Path,
    what: str = "The file",
    *,
    where: str | None = None,
    error: type[UserError] = UserError,
    largest: int = LARGEST_TEXT,
) -> str:
    """Read a text file as UTF-8, with or without a byte order mark, whatever the locale. Every line end becomes `\n`.

    Args: as `open_regular`; `largest`: most bytes that are read.

    Raises:
        UserError: as `open_regular`, and with code file-too-large or file-encoding; the latter names the line.
    """
    with open_regular(path, what, where=where, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > largest else file.read(largest + 1)  # a file of /proc says that it has no bytes
    if max(size, len(content)) > largest:
        raise error(
            f"{what} {path} is larger than {largest >> 20} MiB.",
            code="file-too-large",
            where=where or str(path),
            fix="name a smaller file",
        )
    text, problem, offset = _decode(content)
    if problem:
        line = lines_before(content[:offset].decode("utf-8", errors="replace")) + 1
        place = f"{path}:{line}"
        raise error(
            f"{what} {path} is not UTF-8: {problem}.",
            code="file-encoding",
            where=f"{where}, {place}" if where else place,
            fix="save it as UTF-8",
        )
    return text


def _decode(content: bytes) -> tuple[str, str, int]:
    """The text, or what is wrong with it and at which byte."""
    for mark, name in (
        (codecs.BOM_UTF32_LE, "UTF-32"),
        (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"),
        (codecs.BOM_UTF32_BE, "UTF-32"),
    ):
        if content.startswith(mark):
            return "", f"it begins with the byte order mark of {name}", 0
    mark_length = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[mark_length:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + mark_length
        return "", f"byte 0x{content[offset]:02x} at offset {offset}", offset
    if (nul := content.find(b"\0")) >= 0:
        return "", f"byte 0x00 at offset {nul} (UTF-16 without a byte order mark, or not a text file)", nul
    return text.replace("\r\n", "\n").replace("\r", "\n"), "", 0


def lines_before(text: str) -> int:
    """Count the line ends `\n`, `\r\n` and `\r` in a text."""
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def split_lines(text: str) -> list[str]:
    """Split a text at `\n`, `\r\n` and `\r` only.

    `str.splitlines` splits at U+2028, U+0085, form feed and others too, which are part of a line in a text file.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _refuse_special(mode: int, path: Path, what: str, where: str, error: type[UserError]) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _SPECIAL if test(mode)), "no file")
    raise error(
        f"{what} {path} is {kind}, not a regular file.",
        code="not-a-regular-file",
        where=where,
        fix="name a regular file",
    )


def open_private(path: Path, mode: str) -> int:
    """A file descriptor to write a file that nobody else may read; a link in its place is not followed.

    Args:
        path: the file; made if it is not there.
        mode: "a" to append, "w" to begin anew.

    Raises:
        UserError: `link-in-run-folder` for a link.
        OSError: for all else.
    """
    how = os.O_APPEND if mode == "a" else os.O_TRUNC
    flags = os.O_WRONLY | os.O_CREAT | how | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    if path.is_symlink():
        raise UserError(
            f"{path.name} is a link, which heretic does not write through.",
            code="link-in-run-folder",
            where=str(path),
            fix="remove the link, or put the file itself in its place",
        )
    return os.open(path, flags, 0o600)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part.

    Args:
        path: the file; a link in its place is replaced, not followed.
        text: the content, written as UTF-8.
        private: whether only its owner may read it, whatever the umask; else the umask decides.
    """
    with _no_space_left(path), _temporary_beside(path, private) as beside:
        beside.write_text(text, encoding="utf-8")
        _commit(beside, path)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *, private: bool = False
) -> None:
    """Write a safetensors file as `write_text` does; its metadata holds a hash of the tensors' bytes."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _no_space_left(path), _temporary_beside(path, private) as beside:
        mode = beside.stat().st_mode
        kept = dict(metadata or {})
        save_file(tensors, beside, metadata={**kept, "sha256": _digest(tensors, kept)})
        beside.chmod(stat.S_IMODE(mode))  # the library makes a new file, with a mode of its own
        sort_metadata(beside)
        _commit(beside, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata that `write_tensors` wrote. Raises UserError when the content is not what was written."""
    from safetensors import safe_open
    from safetensors.torch import load_file

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


def expand_user(path: str | Path) -> Path:
    """Replace a leading `~` or `~user` by the home folder. Raises UserError (unknown-home) if that folder is not known."""
    text = os.path.expanduser(path)
    if str(text).startswith("~"):
        user = str(text).split("/")[0]
        raise UserError(
            f"The home folder '{user}' is unknown.",
            code="unknown-home",
            where=str(path),
            fix="write the absolute path, set HOME, or put ./ before a name that begins with ~",
        )
    return Path(text)


def ensure_parent(path: Path) -> Path:
    """The path of a file that is to be written, with its folder made. Raises UserError for what can be no file."""
    path = expand_user(path)
    if path.is_dir():
        raise UserError(
            "heretic writes a file here, but this is a folder.",
            code="not-a-regular-file",
            where=str(path),
            fix="name a file in it or elsewhere",
        )
    make_folder(path.parent, "The folder for the file", fix="name a file in a folder that can be written")
    return path


def make_folder(path: Path, what: str, *, fix: str) -> None:
    """Make a folder and those above it. Raises UserError, with `what` it was to be and how to `fix` it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"{what} cannot be made: {error.strerror or error}."
        raise UserError(text, code="folder-unwritable", where=str(path), fix=fix) from None


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


def fsync(path: Path) -> None:
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


def atomic_swap(one: Path, other: Path) -> bool:
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


@contextlib.contextmanager
def _temporary_beside(path: Path, private: bool) -> Iterator[Path]:
    """An empty file of our own beside `path`, which the context renames; what it leaves is deleted."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)  # of a dead process with our number, or a link that somebody put there
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        yield beside
    finally:
        with contextlib.suppress(OSError):  # on a read-only disk even this fails
            beside.unlink(missing_ok=True)


def _commit(beside: Path, path: Path) -> None:
    fsync(beside)
    os.replace(beside, path)


class _no_space_left:
    """Turns a failed write into an error that names the place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(
                f"{self.path.name} cannot be written: {error}",
                code="file-unwritable",
                where=str(self.path.parent),
                fix="make room or check the permissions, then run the same command again; nothing finished is lost",
            ) from None
