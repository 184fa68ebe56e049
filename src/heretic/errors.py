"""Errors that a user can fix, each with its place and its fix; any other exception is a defect and keeps its traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

# Errors of disks and paths: full, over quota, read-only, not permitted, failing, name too long, not a folder, a folder,
# circular links, stale network file, file too large, lost user-space disk, across disks.
_NAMES = (
    "ENOSPC",
    "EDQUOT",
    "EROFS",
    "EACCES",
    "EPERM",
    "EIO",
    "ENAMETOOLONG",
    "ENOTDIR",
    "EISDIR",
    "ELOOP",
    "ESTALE",
    "EFBIG",
    "ENOTCONN",
    "EXDEV",
)


def _numbers(*names: str) -> tuple[int, ...]:
    return tuple(getattr(errno, name) for name in names if hasattr(errno, name))


LIMIT_ERRNOS = _numbers("EMFILE", "ENFILE", "EAGAIN")
DISK_ERRNOS = _numbers(*_NAMES)
# Those that neither a connection nor another file, such as a certificate's, would raise.
ONLY_OF_WRITING = _numbers("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "EFBIG")
LONGEST_SHOWN = 100  # characters of an invalid value in a message

# Every exit status of every command; `heretic preflight` has its own: 0 ready, 1 will fail, 2 risky.
EXIT_STATUSES = {
    0: "done",
    1: "user error, for example an invalid setting; the message says how to fix it",
    2: "invalid command line",
    3: "another process holds a device or the run",
    4: "the stored study has other settings",
    5: "the exported model differs from the measured model",
    6: "the rebuilt model differs from the manifest's",
    130: "stopped by Ctrl-C or a signal",
}


class UserError(Exception):
    """An error that the user can fix; the command prints it without a traceback and exits with `exit_status`.

    `code` names the kind of error in kebab-case. It is stable: scripts and tests compare it, never the text.
    """

    exit_status = 1
    code = "user-error"

    def __init__(self, what: str, *, code: str | None = None, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.code = code or type(self).code
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        """Return one to three lines: the problem with its code, the place, the fix."""
        lines = [self.what if self.code == UserError.code else f"{self.what} [{self.code}]"]
        if self.where:
            lines.append(f"Where: {self.where}")
        if self.fix:
            lines.append(f"To fix: {self.fix}")
        return "\n".join(lines)


def plain_line(text: str) -> str:
    """Escape line breaks and terminal control characters, but not the joiners of Persian, Indic and emoji text."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else f"\\x{ord(c):02x}" for c in text)


def shortened(text: str) -> str:
    """Return a text as `plain_line`, of at most LONGEST_SHOWN characters, for a message."""
    return plain_line(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…")


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can encode a text: it has no surrogates, of bytes from a terminal or escaped in JSON."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, as `plain_line`, or its class name if the text is empty."""
    return plain_line((str(error).strip().splitlines() or [type(error).__name__])[0])


def disk_error(error: OSError) -> UserError:
    """Convert an error of the disk into a UserError."""
    name = str(error.filename or "")
    return UserError(
        f"{error.strerror or error}.",
        code="disk",
        where=name if len(name) < 300 else f"{name[:300]}…",
        fix="free disk space or check permissions and name, then run the same command again; nothing finished is lost",
    )


def cache_error(error: BaseException, caches: Mapping[str, str | os.PathLike[str]]) -> UserError | None:
    """Return the error for a cache of the hub's libraries that cannot be written, if that is behind an error of theirs.

    `caches` are the caches of other libraries than the hub's own, by the variable of the environment that names the folder;
    an error without a file name is of the first.
    """
    from huggingface_hub import constants

    own = {name: getattr(constants, name) for name in ("HF_HUB_CACHE", "HF_XET_CACHE", "HF_HOME")}
    folders = {**caches, **own}
    cause: BaseException | None = error
    while cause is not None:
        variable = None
        if isinstance(cause, OSError) and cause.filename and cause.errno in DISK_ERRNOS:
            variable = _cache_of(str(cause.filename), folders)
        elif isinstance(cause, OSError) and not cause.filename and cause.errno in ONLY_OF_WRITING:
            variable = next(iter(folders))
        if variable and isinstance(cause, OSError):
            return UserError(
                f"The hub's cache cannot be written: {cause.strerror}.",
                code="disk",
                where=plain_line(str(cause.filename)) if cause.filename else None,
                fix=f"free disk space or check permissions, or set {variable} to a folder on another disk",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _cache_of(name: str, folders: Mapping[str, str | os.PathLike[str]]) -> str | None:
    """Return the variable of the cache that holds a file, or whose folder a missing one would hold; None for the token."""
    from huggingface_hub import constants

    tokens = (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH)
    if os.path.abspath(name) in [os.path.abspath(token) for token in tokens]:
        return None
    for variable, folder in folders.items():
        for path_of in (os.path.abspath, os.path.realpath):
            path, cache = path_of(name), path_of(folder)
            if f"{path}/".startswith(f"{cache}/"):
                return variable
            if f"{cache}/".startswith(f"{path}/") and not os.path.exists(path):
                return variable
    return None


def limit_error(error: BaseException) -> UserError:
    """Convert an error of a limit on files, processes or threads into a UserError."""
    return UserError(
        f"A limit of this machine is reached: {first_line(error).rstrip('.')}.",
        code="machine-limit",
        fix="raise it (ulimit -n, ulimit -u, the container's pids), then run the same command again; nothing finished is lost",
    )


def no_folder_error() -> UserError:
    """Return the error for a current folder that has been deleted or is on a lost disk."""
    return UserError(
        "The current folder does not exist any more.", code="no-current-folder", fix="cd to a folder that exists"
    )


class OutOfMemory(UserError):
    """Memory ran out and the batch could not be made smaller."""

    code = "out-of-memory"


def memory_error(error: BaseException) -> OutOfMemory:
    """Convert an out-of-memory error into a UserError."""
    return OutOfMemory(
        f"Memory ran out: {first_line(error).rstrip('.')}.",
        fix="free memory (heretic preflight shows the use), then run the same command again; nothing finished is lost",
    )


class JudgeFailed(UserError):
    """The judge gave no verdict; the run stops, and resuming it samples the running trials again."""

    code = "judge-failed"


class SettingsError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""

    code = "invalid-setting"


class BusyError(UserError):
    """Another process holds a device or a run."""

    exit_status = 3
    code = "busy"


class StudyMismatch(UserError):
    """A stored study has settings that give other results."""

    exit_status = 4
    code = "study-mismatch"


class VerificationFailed(UserError):
    """The written model differs from the measured model."""

    exit_status = 5
    code = "verification-failed"


class NotReproduced(UserError):
    """A model rebuilt from its manifest differs from the manifest's model."""

    exit_status = 6
    code = "not-reproduced"


class Interrupted(Exception):
    """The user stopped the program (Ctrl-C, SIGTERM); all finished work is stored."""

    exit_status = 130
