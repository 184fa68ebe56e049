"""Errors a user can act on: what is wrong, where, and what to do. Anything else is a defect and keeps its traceback."""

from __future__ import annotations

import errno

# What a disk or a path does to a program, wherever in it: full, over quota, read-only, not allowed, failing, a name too long,
# a file where a folder should be and the other way round, links in a circle, a network disk that is gone, a file too large.
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
)
DISK_ERRNOS = tuple(getattr(errno, name) for name in _NAMES if hasattr(errno, name))

# Every exit status of every command; `heretic preflight` has its own: 0 ready, 1 will fail, 2 risky.
EXIT_STATUSES = {
    0: "done",
    1: "an error that you can put right",
    2: "a wrong command line",
    3: "another process holds a device or the run",
    4: "the stored study was made with other settings",
    5: "the exported model is not the model that was measured",
    6: "the rebuilt model is not the one of the manifest",
    130: "stopped by Ctrl-C or a signal",
}


class UserError(Exception):
    """Something the user can fix; the command prints it without a traceback and exits with `exit_status`.

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
        """One to three lines: what and the code, where, what to do."""
        lines = [self.what if self.code == UserError.code else f"{self.what} [{self.code}]"]
        if self.where:
            lines.append(f"Where: {self.where}")
        if self.fix:
            lines.append(f"To fix: {self.fix}")
        return "\n".join(lines)


def plain_line(text: str) -> str:
    """Text on one line and without what steers a terminal: such characters are shown, not sent."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def disk_error(error: OSError) -> UserError:
    """What the disk has done, for one who can put it right."""
    name = str(error.filename or "")
    return UserError(
        f"{error.strerror or error}.",
        code="disk",
        where=name if len(name) < 300 else f"{name[:300]}…",
        fix="make room, check the permissions or the name, then run the same command again; nothing finished is lost",
    )


class OutOfMemory(UserError):
    """Memory ran out where no batch could be made smaller."""

    code = "out-of-memory"


def memory_error(error: BaseException) -> OutOfMemory:
    """Memory that ran out where no batch could be made smaller."""
    return OutOfMemory(
        f"Memory ran out: {first_line(error).rstrip('.')}.",
        fix="make room (heretic preflight shows what is taken), then run the same command again; nothing finished is lost",
    )


class JudgeFailed(UserError):
    """The judge gave no verdict. No trial is at fault: the run stops, and the trials under way are drawn again when it resumes."""

    code = "judge-failed"


class SettingsError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""

    code = "invalid-setting"


class BusyError(UserError):
    """Another process holds a device or a run."""

    exit_status = 3
    code = "busy"


class StudyMismatch(UserError):
    """A stored study was made with settings that give other results."""

    exit_status = 4
    code = "study-mismatch"


class VerificationFailed(UserError):
    """The written model is not the model that was measured."""

    exit_status = 5
    code = "verification-failed"


class NotReproduced(UserError):
    """A model made again from its manifest differs from the one that the manifest is of."""

    exit_status = 6
    code = "not-reproduced"


class Interrupted(Exception):
    """The user asked to stop (Ctrl-C, SIGTERM); everything finished so far is stored."""

    exit_status = 130
