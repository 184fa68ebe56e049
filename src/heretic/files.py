"""Read files safely; write files atomically, tensors with a hash."""

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

if TYPE_CHECKING:  # PyTorch takes seconds to import, and settings do not need it
    from torch import Tensor

LARGEST_TEXT = 256 << 20  # bytes of a text file
# Only Windows has O_BINARY, and it lacks the others. O_NONBLOCK: opening a pipe without a writer must not block.
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
    """Open a regular file for reading; refuse pipes, devices and folders.

    Args:
        path: the file; links are followed.
        what: a description of the file for messages, such as "The settings file".
        where: the setting that names the file; default: the path.
        error: class of the error to raise, with code missing-file, unreadable-file or not-a-regular-file.
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
        _refuse_special(os.fstat(handle).st_mode, path, what, where, error)  # it may have changed since the first check
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
    """Read a text file as UTF-8, with or without a byte order mark, in any locale. Every line end becomes `\n`.

    Args:
        path, what, where, error: as for `open_regular`.
        largest: maximum size in bytes.

    Raises:
        UserError: as `open_regular`, or with code file-too-large or file-encoding, which names the line.
    """
    with open_regular(path, what, where=where, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > largest else file.read(largest + 1)  # files in /proc report size 0
    if max(size, len(content)) > largest:
        raise error(
            f"{what} {path} is larger than {largest >> 20} MiB.",
            code="file-too-large",
            where=where or str(path),
            fix="use a smaller file",
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
    """Return text, problem and byte offset of the problem; the problem is empty for valid text."""
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

    `str.splitlines` also splits at U+2028, U+0085, form feed and others, which belong to a line of a text file.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _refuse_special(mode: int, path: Path, what: str, where: str, error: type[UserError]) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _SPECIAL if test(mode)), "of unknown type")
    raise error(
        f"{what} {path} is {kind}, not a regular file.",
        code="not-a-regular-file",
        where=where,
        fix="use a regular file",
    )


def open_private(path: Path, mode: str) -> int:
    """Open a file for writing that only its owner can read; do not follow links.

    Args:
        path: the file; created if missing.
        mode: "a" to append, "w" to truncate.

    Returns:
        The file descriptor.

    Raises:
        UserError: with code link-in-run-folder, for a link.
        OSError: for any other problem.
    """
    position = os.O_APPEND if mode == "a" else os.O_TRUNC
    flags = os.O_WRONLY | os.O_CREAT | position | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    if path.is_symlink():
        raise link_error(path)
    return os.open(path, flags, 0o600)


def link_error(path: Path) -> UserError:
    """Return the error for a link in a run's folder."""
    return UserError(
        f"{path.name} is a symbolic link. heretic does not write through links.",
        code="link-in-run-folder",
        where=str(path),
        fix="replace the link with the file itself, or delete it",
    )


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file atomically, as UTF-8.

    Args:
        path: the file; a link is replaced, not followed.
        text: the content.
        private: if true, only the owner can read the file; else the umask decides.
    """
    with _translate_write_errors(path), _temporary_file(path, private) as temporary:
        temporary.write_text(text, encoding="utf-8")
        _commit(temporary, path)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *, private: bool = False
) -> None:
    """Write a safetensors file atomically, with a hash of tensors and metadata in its metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _translate_write_errors(path), _temporary_file(path, private) as temporary:
        mode = temporary.stat().st_mode
        own_metadata = dict(metadata or {})
        save_file(tensors, temporary, metadata={**own_metadata, "sha256": _digest(tensors, own_metadata)})
        temporary.chmod(stat.S_IMODE(mode))  # safetensors creates a new file with its own mode
        sort_metadata(temporary)
        _commit(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata written by `write_tensors`.

    Raises:
        UserError: with code damaged-file, if the content differs from what was written.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    if path.exists() and not path.is_file():  # opening a pipe would block
        raise _damaged(path, "is not a regular file.")
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"is damaged: {first_line(error)}") from None
    if metadata.get("sha256") != _digest(tensors, metadata):
        raise _damaged(path, "is damaged: its content does not match its hash.")
    return tensors, metadata


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path.name} {problem}", code="damaged-file", where=str(path), fix="delete it; heretic recomputes it"
    )


def expand_user(path: str | Path) -> Path:
    """Replace a leading `~` or `~user` with the home folder. Raises UserError (unknown-home) for an unknown user."""
    text = os.path.expanduser(path)
    if str(text).startswith("~"):
        user = str(text).split("/")[0]
        raise UserError(
            f"The home folder '{user}' is unknown.",
            code="unknown-home",
            where=str(path),
            fix="write the absolute path, set HOME, or write ./~name for a file name that begins with ~",
        )
    return Path(text)


def ensure_parent(path: Path) -> Path:
    """Return the expanded path of an output file and create its folder. Raises UserError if the path is a folder."""
    path = expand_user(path)
    if path.is_dir():
        raise UserError(
            "The path of the output file is a folder.",
            code="not-a-regular-file",
            where=str(path),
            fix="add a file name to the path",
        )
    make_folder(path.parent, "The folder for the file", fix="choose a file in a writable folder")
    return path


def make_folder(path: Path, what: str, *, fix: str) -> None:
    """Create a folder and its parents.

    Args:
        path: the folder.
        what: a description of the folder for the message.
        fix: the fix for the message.

    Raises:
        UserError: with code folder-unwritable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"{what} cannot be created: {error.strerror or error}."
        raise UserError(text, code="folder-unwritable", where=str(path), fix=fix) from None


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in random order, so that its bytes are reproducible."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if len(header.get("__metadata__", {})) < 2:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # longer only if the two libraries encode a character differently
            file.seek(8)
            file.write(text.ljust(size))


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file's content or a folder's entries to the disk, so that they survive a power loss."""
    if path.is_dir():
        with contextlib.suppress(OSError):  # some systems and network disks do not support this for folders
            _sync(path)
    else:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_swap(first: Path, second: Path) -> bool:
    """Swap the names of two existing paths atomically; return False if the system does not support it.

    Linux: renameat2(2) with RENAME_EXCHANGE. macOS: renamex_np with RENAME_SWAP, see rename(2).
    """
    names = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, 2) == 0)
        at_cwd = -100  # AT_FDCWD: relative paths start at the current folder
        return bool(library.renameat2(at_cwd, names[0], at_cwd, names[1], 2) == 0)
    except (OSError, AttributeError, TypeError):  # another system, or an old C library
        return False


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in metadata.items() if k != "sha256")).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _temporary_file(path: Path, private: bool) -> Iterator[Path]:
    """Yield a new empty file in the folder of `path`, and delete it unless the context renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # left by a dead process with the same number, or somebody's link
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # fails on a read-only disk
            temporary.unlink(missing_ok=True)


def _commit(temporary: Path, path: Path) -> None:
    fsync(temporary)
    os.replace(temporary, path)


class _translate_write_errors:
    """Turn a failed write into a UserError that names the folder."""

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
                fix="free disk space or check the permissions, then run the same command again; nothing finished is lost",
            ) from None
