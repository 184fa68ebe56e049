"""Lock devices and run folders; the operating system releases a lock when its owner dies.

A note beside each lock describes the owner. It counts only while the lock is taken and the owner's process runs.
"""

from __future__ import annotations

import errno
import getpass
import json
import os
import re
import shlex
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from heretic.errors import BusyError, UserError
from heretic.hardware.processes import is_running, process_start

COMMAND_LENGTH = 200
# Seconds. `lock_owner` takes a lock for an instant to test it; a run that starts at that moment must not fail.
ACQUIRE_TIMEOUT = 0.5
POLL = 0.1
LOGINS = "/run/user/"  # folders that systemd deletes when a user has logged out, also while a run goes on
TEMPORARY = Path("/tmp")  # not TMPDIR, which job schedulers set for each job
# Seconds by which a process can seem younger than an earlier version's note, which has no `began`: start times are rounded.
CLOCK_SLACK = 5.0

_CREDENTIALS = re.compile(r"://[^\s'\"]*@")
_SECRETS = re.compile(r"((?:password|passwd|token|secret|api_key)[^\s=&'\"]*[= ])[^\s&'\"]+", re.IGNORECASE)


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock."""

    pid: int  # 0 for an unknown process
    host: str
    command: str
    model: str
    since: str  # local time in ISO format
    began: float | None = None  # `process_start`; None in a note of an earlier version

    @property
    def known(self) -> bool:
        """Whether the owner's process is known."""
        return self.pid > 0

    @property
    def is_this_process(self) -> bool:
        """Whether the owner is the current process."""
        return self.pid == os.getpid() and self.host == socket.gethostname()

    def __str__(self) -> str:
        if not self.known:
            return "an unknown process"
        model = f", model {self.model}" if self.model else ""
        return f"process {self.pid} on {self.host}{model}, since {self.since}: {self.command}"


UNKNOWN = LockOwner(pid=0, host="", command="", model="", since="")


def runtime_folder() -> Path:
    """Return the user's folder for locks: in the temporary folder, or in an XDG_RUNTIME_DIR that is not a login's.

    Logins, cron and job schedulers set different folders, or none, and must meet; one that somebody chose separates runs.

    Raises UserError if it is not writable or belongs to another user, who could attack through it.
    """
    chosen, folder = os.environ.get("XDG_RUNTIME_DIR", ""), Path()
    try:
        if chosen and not chosen.startswith(LOGINS) and os.access(chosen, os.W_OK):
            folder = Path(chosen) / "heretic"
        elif hasattr(os, "getuid") and os.access(TEMPORARY, os.W_OK):
            folder = TEMPORARY / f"heretic-{os.getuid()}"
        else:
            user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
            folder = Path(tempfile.gettempdir()) / f"heretic-{user}"  # tries to write: a disk may be full
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.lstat().st_uid  # of a link, whoever made it
    except OSError as error:
        raise UserError(
            f"The folder for locks cannot be created: {error.strerror}.",
            code="lock-unavailable",
            where=str(folder),
            fix="free disk space, or set XDG_RUNTIME_DIR to a writable folder",
        ) from None
    if hasattr(os, "getuid") and owner != os.getuid():
        raise UserError(
            "The folder for locks belongs to another user.",
            code="lock-unavailable",
            where=str(folder),
            fix="set XDG_RUNTIME_DIR to a folder of your own",
        )
    return folder


def device_locks(gpu_uuids: Sequence[str]) -> list[Path]:
    """Return the lock file of every GPU, or the CPU's for a run without GPUs."""
    folder = runtime_folder()
    names = [f"gpu-{re.sub(r'[^A-Za-z0-9-]', '-', uuid)}.lock" for uuid in gpu_uuids] or ["cpu.lock"]
    return [folder / name for name in names]


@contextmanager
def acquire_locks(
    paths: Sequence[Path],
    *,
    model: str,
    wait: bool = False,
    on_wait: Callable[[Path, LockOwner | None], None] | None = None,
    while_waiting: Callable[[], None] = lambda: None,
    parent_pid: int = 0,
    shared: bool = False,
) -> Iterator[None]:
    """Hold all locks, each with a note on its owner, until the context ends.

    Args:
        paths: the lock files.
        model: the model, for the notes.
        wait: whether to wait for a taken lock.
        on_wait: called before waiting for a lock, with its path and its owner (None if unknown).
        while_waiting: called repeatedly while waiting; ends the wait by raising.
        parent_pid: process that started this one as a worker and shares its locks; 0 for none.
        shared: whether this process may hold a lock several times, as the sessions of a notebook do.

    Raises:
        BusyError: for a taken lock, without `wait`.
        UserError: with code lock-unavailable, for an unwritable lock file.
    """
    with ExitStack() as held:
        for path in sorted(set(paths)):  # always in the same order, so that two processes never wait for each other
            if parent_pid and _owned_by_parent(path, parent_pid):
                continue
            acquire = partial(_acquire_with_note, path, model, wait, on_wait, while_waiting)
            if shared:
                held.callback(_let_go, _share(path, acquire))
            else:
                held.enter_context(acquire())
        yield


def _acquire_with_note(
    path: Path,
    model: str,
    wait: bool,
    on_wait: Callable[[Path, LockOwner | None], None] | None,
    while_waiting: Callable[[], None],
) -> ExitStack:
    with ExitStack() as held:
        _acquire(path, wait, on_wait, while_waiting, held)
        note = _note(path)
        held.callback(note.unlink, missing_ok=True)  # runs before the lock is released
        _write(note, _this_process(model))
        return held.pop_all()


@dataclass
class _Shared:
    """A lock that several parts of this process hold."""

    path: Path
    lock: ExitStack
    pid: int = field(default_factory=os.getpid)  # a fork does not hold it
    holders: int = 1


_shared: dict[Path, _Shared] = {}
_sharing = threading.Lock()


def _share(path: Path, acquire: Callable[[], ExitStack]) -> _Shared:
    with _sharing:
        known = _shared.get(path)
        if known is not None and known.pid == os.getpid():
            known.holders += 1
        else:
            known = _shared[path] = _Shared(path, acquire())
        return known


def _let_go(held: _Shared) -> None:
    if held.pid != os.getpid():
        return
    with _sharing:
        held.holders -= 1
        if not held.holders:
            del _shared[held.path]
            held.lock.close()


def lock_owner(path: Path) -> LockOwner | None:
    """Return the lock's current owner: None for a free lock, `UNKNOWN` for an unknown owner."""
    if not path.exists():
        return None
    try:
        with FileLock(path, timeout=0, mode=0o600):
            return None
    except Timeout:
        return _read(_note(path)) or UNKNOWN
    except OSError:  # an unwritable folder: only the note is available
        return _read(_note(path))


def _owned_by_parent(path: Path, parent_pid: int) -> bool:
    owner = lock_owner(path)
    return owner is not None and owner.pid == parent_pid and owner.host == socket.gethostname()


def _acquire(
    path: Path,
    wait: bool,
    on_wait: Callable[[Path, LockOwner | None], None] | None,
    while_waiting: Callable[[], None],
    held: ExitStack,
) -> None:
    lock = FileLock(path, mode=0o600)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock.acquire(timeout=ACQUIRE_TIMEOUT, poll_interval=POLL / 2))
        return
    except Timeout:
        owner = _read(_note(path))
    except OSError as error:
        raise _unwritable(path, error) from None
    if not wait:
        raise BusyError(
            f"{_locked_object(path)} is in use by {owner or UNKNOWN}",
            where=str(path),
            fix="close the session of this process that holds it: session.close()"
            if owner and owner.is_this_process
            else "wait for it with --wait" + (f", or end it: kill {owner.pid} (on {owner.host})" if owner else ""),
        )
    if on_wait:
        on_wait(path, owner)
    while True:
        while_waiting()
        with suppress(Timeout):
            held.enter_context(lock.acquire(timeout=ACQUIRE_TIMEOUT, poll_interval=POLL))
            return


def _locked_object(path: Path) -> str:
    if path.name == "cpu.lock":
        return "The CPU"
    return f"GPU {path.stem.removeprefix('gpu-')}" if path.name.startswith("gpu-") else f"The folder {path.parent}"


def _unwritable(path: Path, error: OSError) -> UserError:
    # Some network and user-space disks.
    without_locks = error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
    return UserError(
        f"The lock cannot be acquired: {error.strerror or error}.",
        code="lock-unavailable",
        where=str(path),
        fix="use a disk that supports file locks, for example runs_dir on a local one"
        if without_locks
        else "make this folder writable",
    )


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _this_process(model: str) -> LockOwner:
    pid = os.getpid()
    return LockOwner(pid, socket.gethostname(), _command(), model, _now(), process_start(pid))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _command() -> str:
    """Return this process's command line without secrets, shortened."""
    words = [Path(sys.argv[0]).name or "python", *sys.argv[1:]]
    text = _SECRETS.sub(r"\1***", _CREDENTIALS.sub("://***@", shlex.join(words)))
    return text if len(text) <= COMMAND_LENGTH else text[: COMMAND_LENGTH - 1] + "…"


def _write(note: Path, content: LockOwner) -> None:
    draft = note.with_name(f"{note.name}.{os.getpid()}")
    draft.write_text(json.dumps(asdict(content)), encoding="utf-8")
    os.replace(draft, note)


def _read(note: Path) -> LockOwner | None:
    """Return the note's owner if it can be the lock's current owner."""
    try:
        owner = LockOwner(**json.loads(note.read_text(encoding="utf-8")))
        written = datetime.fromisoformat(owner.since).timestamp()
        if owner.host != socket.gethostname():
            return owner  # a folder shared by several machines
        began = owner.began
        if began is None:
            began = process_start(owner.pid)
            if psutil.Process(owner.pid).create_time() > written + CLOCK_SLACK:
                return None  # the system reused the process number
        return owner if is_running(owner.pid, began) else None
    except (OSError, ValueError, TypeError, psutil.Error):
        return None  # no note, an invalid note, or a dead process
