"""One run per device: locks that the operating system frees when their holder dies, and notes that say who holds them.

The lock decides, the note beside it only explains. A note is believed only while its lock is taken and the process it names
still runs, so what a killed process left behind neither blocks nor misleads.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from heretic.errors import BusyError, UserError

COMMAND_LENGTH = 200
# `holder` takes a lock for an instant to see whether it is free; a run that starts at that moment must not fail for it.
ACQUIRE_TIMEOUT = 0.5
POLL = 0.1
# How much younger than its note a process may seem: start times are rounded, and both clocks are read separately.
CLOCK_SLACK = 5.0

_CREDENTIALS = re.compile(r"://[^\s'\"]*@")
_SECRETS = re.compile(r"((?:password|passwd|token|secret|api_key)[^\s=&'\"]*[= ])[^\s&'\"]+", re.IGNORECASE)


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock; `since` is ISO local time. A `pid` of 0 says that only the fact of holding is known."""

    pid: int
    host: str
    command: str
    model: str
    since: str

    @property
    def known(self) -> bool:
        """Whether more is known than that somebody holds the lock."""
        return self.pid > 0

    @property
    def is_this_process(self) -> bool:
        """Whether the holder is the process that asks."""
        return self.pid == os.getpid() and self.host == socket.gethostname()

    def __str__(self) -> str:
        if not self.known:
            return "another process, which left no note"
        model = f", model {self.model}" if self.model else ""
        return f"process {self.pid} on {self.host}{model}, since {self.since}: {self.command}"


UNKNOWN = LockOwner(pid=0, host="", command="", model="", since="")


def runtime_folder() -> Path:
    """The user's folder for locks: the session's runtime folder if there is one, else one for this user beside /tmp.

    Raises UserError where neither can be written, or where another user owns the folder (it could be a trap).
    """
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session and os.access(session, os.W_OK):
        folder = Path(session) / "heretic"
    else:
        user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
        folder = Path(tempfile.gettempdir()) / f"heretic-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise UserError(
            f"The folder for locks cannot be created: {error.strerror}.",
            code="lock-unavailable",
            where=str(folder),
            fix="set XDG_RUNTIME_DIR or TMPDIR to a folder that you can write to",
        ) from None
    if hasattr(os, "getuid") and owner != os.getuid():
        raise UserError(
            "The folder for locks belongs to another user.",
            code="lock-unavailable",
            where=str(folder),
            fix="set XDG_RUNTIME_DIR or TMPDIR",
        )
    return folder


def device_locks(gpu_uuids: Sequence[str]) -> list[Path]:
    """The lock of every GPU, or the CPU's where no GPU is used."""
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
) -> Iterator[None]:
    """Hold all locks, each with a note saying who holds it, until the context ends.

    What the process `lender` holds (0: none) is not taken but used with it: it has started this one as one of its workers.

    A taken lock raises BusyError naming its holder; with `wait` it is queued for, after `on_wait` was told the path and the
    holder (None if it is not known), once for each lock that is waited for; `while_waiting` is called again and again and ends
    the waiting by raising. Raises UserError where a lock file cannot be written.
    """
    with ExitStack() as held:
        for path in sorted(set(paths)):  # always in the same order, so that two processes never wait for each other
            if parent_pid and _owned_by_parent(path, parent_pid):
                continue
            _acquire(path, wait, on_wait, while_waiting, held)
            note = _note(path)
            held.callback(note.unlink, missing_ok=True)  # runs before the lock is released
            _write(note, LockOwner(os.getpid(), socket.gethostname(), _command(), model, _now()))
        yield


def lock_owner(path: Path) -> LockOwner | None:
    """Who holds the lock now: None if it is free, a Holder that is not `known` if nobody can be named."""
    if not path.exists():
        return None
    try:
        with FileLock(path, timeout=0, mode=0o600):
            return None
    except Timeout:
        return _read(_note(path)) or UNKNOWN
    except OSError:  # a folder that only others may write to, or nobody now: only the note can tell
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
            f"{_thing(path)} is in use by {owner or UNKNOWN}",
            where=str(path),
            fix="wait for it with --wait" + (f", or end it: kill {owner.pid} (on {owner.host})" if owner else ""),
        )
    if on_wait:
        on_wait(path, owner)
    while True:
        while_waiting()
        with suppress(Timeout):
            held.enter_context(lock.acquire(timeout=ACQUIRE_TIMEOUT, poll_interval=POLL))
            return


def _thing(path: Path) -> str:
    if path.name == "cpu.lock":
        return "The CPU"
    return f"GPU {path.stem.removeprefix('gpu-')}" if path.name.startswith("gpu-") else f"The folder {path.parent}"


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"The lock cannot be taken: {error.strerror or error}.",
        code="lock-unavailable",
        where=str(path),
        fix="make this folder writable",
    )


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _command() -> str:
    """This process's command line without secrets, shortened."""
    words = [Path(sys.argv[0]).name or "python", *sys.argv[1:]]
    text = _SECRETS.sub(r"\1***", _CREDENTIALS.sub("://***@", shlex.join(words)))
    return text if len(text) <= COMMAND_LENGTH else text[: COMMAND_LENGTH - 1] + "…"


def _write(note: Path, content: LockOwner) -> None:
    draft = note.with_name(f"{note.name}.{os.getpid()}")
    draft.write_text(json.dumps(asdict(content)), encoding="utf-8")
    os.replace(draft, note)


def _read(note: Path) -> LockOwner | None:
    """The note's holder if it can be the one that holds the lock now."""
    try:
        found = LockOwner(**json.loads(note.read_text(encoding="utf-8")))
        written = datetime.fromisoformat(found.since).timestamp()
        if found.host != socket.gethostname():
            return found  # a folder shared by several machines
        process = psutil.Process(found.pid)
        younger = process.create_time() > written + CLOCK_SLACK  # the number was given to another process since
        return None if younger or process.status() == psutil.STATUS_ZOMBIE else found
    except (OSError, ValueError, TypeError, psutil.Error):
        return None  # no note, not one of ours, or its process is dead
