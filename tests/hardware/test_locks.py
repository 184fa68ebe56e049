"""Locks between real processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from heretic.errors import BusyError
from heretic.hardware import locks
from heretic.hardware.locks import LockOwner, acquire_locks, device_locks, lock_owner, runtime_folder
from tests.helpers.errors import raises

HOLD = """
import sys
from pathlib import Path
from heretic.hardware.locks import acquire_locks
wait, model, *paths = sys.argv[1:]
with acquire_locks([Path(p) for p in paths], model=model, wait=wait == "wait", on_wait=lambda *_: print("waiting", flush=True)):
    print("held", flush=True)
    sys.stdin.read()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that hold locks until their input is closed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*paths: Path, wait: bool = False, model: str = "owner/model") -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLD, "wait" if wait else "now", model, *map(str, paths)]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def note_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def test_a_second_process_names_the_owner_of_the_lock(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "gpu-1.lock"
    first = start(path, model="owner/first")
    assert says(first) == "held"
    found = lock_owner(path)
    assert found is not None and (found.pid, found.host, found.model) == (
        first.pid,
        socket.gethostname(),
        "owner/first",
    )
    assert found.known and not found.is_this_process
    with raises("busy", BusyError) as error, acquire_locks([path], model="owner/second"):
        pass
    text = str(error.value)
    for part in (str(first.pid), socket.gethostname(), "owner/first", found.since, "--wait", "GPU 1"):
        assert part in text
    first.communicate("")
    assert lock_owner(path) is None
    with acquire_locks([path], model="owner/second"):
        mine = lock_owner(path)
        assert mine is not None and mine.is_this_process


def test_kill_9_frees_the_lock_and_its_note_is_not_believed(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "cpu.lock"
    first = start(path)
    assert says(first) == "held"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert note_of(path).exists()
    assert lock_owner(path) is None
    with acquire_locks([path], model=""):
        assert json.loads(note_of(path).read_text())["pid"] == os.getpid()
    assert not note_of(path).exists()


def test_waiting_process_gets_the_lock_when_the_holder_is_killed(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "cpu.lock"
    first = start(path)
    assert says(first) == "held"
    second = start(path, wait=True)
    assert says(second) == "waiting"
    first.send_signal(signal.SIGKILL)
    assert says(second) == "held"
    found = lock_owner(path)
    assert found is not None and found.pid == second.pid


def test_waiting_can_be_interrupted(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "cpu.lock"
    assert says(start(path)) == "held"
    second = start(path, wait=True)
    assert says(second) == "waiting"
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=5)
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("stale", ["dead", "younger", "broken", "missing"])
def test_untrustworthy_note_names_nobody(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, stale: str
) -> None:
    monkeypatch.setattr(locks, "ACQUIRE_TIMEOUT", 0.05)
    path = tmp_path / "cpu.lock"
    assert says(start(path)) == "held"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    # A process that runs, but began long after the note was written: the number was given out again.
    pid, since = (gone.pid, locks._now()) if stale == "dead" else (os.getpid(), "2001-01-01T00:00:00+00:00")
    content = json.dumps(LockOwner(pid, socket.gethostname(), "old command", "old/model", since).__dict__)
    note_of(path).write_text("{" if stale == "broken" else content)
    if stale == "missing":
        note_of(path).unlink()
    found = lock_owner(path)
    assert found is not None and not found.known
    told: list[LockOwner | None] = []
    with raises("busy", BusyError) as error, acquire_locks([path], model=""):
        pass
    assert "old" not in str(error.value) and str(os.getpid()) not in str(error.value)

    def on_wait(_: Path, who: LockOwner | None) -> None:
        told.append(who)
        raise InterruptedError

    with pytest.raises(InterruptedError), acquire_locks([path], model="", wait=True, on_wait=on_wait):
        pass
    assert told == [None]


@pytest.mark.parametrize("hours", [-1, 1])
def test_an_owner_is_known_after_the_clock_was_set(tmp_path: Path, start: Start, hours: int) -> None:
    path = tmp_path / "cpu.lock"
    process = start(path)
    assert says(process) == "held"
    note = json.loads(note_of(path).read_text())
    note["since"] = (datetime.fromisoformat(note["since"]) + timedelta(hours=hours)).isoformat()
    note_of(path).write_text(json.dumps(note))
    found = lock_owner(path)
    assert found is not None and found.pid == process.pid
    with acquire_locks([path], model="", parent_pid=process.pid):
        pass
    note_of(path).write_text(json.dumps({**note, "began": note["began"] - 10}))
    assert lock_owner(path) == locks.UNKNOWN, "the process number was given out again"
    del note["began"]
    note_of(path).write_text(json.dumps({**note, "since": locks._now()}))
    found = lock_owner(path)
    assert found is not None and found.pid == process.pid, "a note of an earlier version"


def test_note_of_another_machine_is_believed(tmp_path: Path, start: Start) -> None:
    path = tmp_path / ".lock"
    assert says(start(path)) == "held"
    elsewhere = LockOwner(1, "another-host", "heretic", "owner/model", locks._now())
    note_of(path).write_text(json.dumps(elsewhere.__dict__))
    assert lock_owner(path) == elsewhere


def test_all_or_nothing_in_one_order(tmp_path: Path, start: Start) -> None:
    a, b = tmp_path / "a.lock", tmp_path / "b.lock"
    first = start(b)
    assert says(first) == "held"
    with pytest.raises(BusyError), acquire_locks([b, a], model=""):
        pass
    assert lock_owner(a) is None and not note_of(a).exists()
    both = [start(a, b, wait=True), start(b, a, wait=True)]
    first.communicate("")
    deadline = time.monotonic() + 10
    while any(process.poll() is None for process in both) and time.monotonic() < deadline:
        for process in both:
            if process.stdin and not process.stdin.closed:
                process.stdin.close()
        time.sleep(0.05)
    assert [process.wait(timeout=5) for process in both] == [0, 0]


def test_probing_does_not_disturb_a_start(tmp_path: Path) -> None:
    path = tmp_path / "cpu.lock"
    path.touch()
    stop = threading.Event()

    def probe() -> None:
        while not stop.is_set():
            lock_owner(path)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        for _ in range(20):
            with acquire_locks([path], model=""):
                pass
    finally:
        stop.set()
        prober.join()


def test_secrets_are_masked_and_the_command_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = "storage=postgresql://user:pa@ss/word@db.example:5432/heretic"
    monkeypatch.setattr(
        sys, "argv", ["/usr/bin/heretic", "--set", storage, "--set", "hf_token=abc123", *["--long"] * 100]
    )
    text = locks._command()
    assert text.startswith("heretic --set") and "://***@db.example" in text
    assert "pa@ss" not in text and "word" not in text and "abc123" not in text
    assert len(text) == locks.COMMAND_LENGTH and text.endswith("…")


def test_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "TEMPORARY", tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_folder() == tmp_path / "heretic"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    folder = runtime_folder()
    assert folder == tmp_path / f"heretic-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.name for p in device_locks([])] == ["cpu.lock"]
    assert [p.name for p in device_locks(["GPU-1/2", "GPU-3"])] == ["gpu-GPU-1-2.lock", "gpu-GPU-3.lock"]
    monkeypatch.setattr(locks, "TEMPORARY", tmp_path / "missing")
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
    assert runtime_folder() == tmp_path / "other" / f"heretic-{os.getuid()}"


def test_runs_of_logins_cron_and_job_schedulers_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logins, jobs = tmp_path / "run" / "user", tmp_path / "jobs"
    for folder in (logins / "1000", logins / "1001", jobs / "1", jobs / "2"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(locks, "LOGINS", f"{logins}/")
    monkeypatch.setattr(locks, "TEMPORARY", tmp_path)
    found = set()
    for runtime in (logins / "1000", logins / "1001", None):
        for temporary in (jobs / "1", jobs / "2", None):
            for name, value in (("XDG_RUNTIME_DIR", runtime), ("TMPDIR", temporary)):
                if value:
                    monkeypatch.setenv(name, str(value))
                else:
                    monkeypatch.delenv(name, raising=False)
            monkeypatch.setattr("tempfile.tempdir", None)
            found.add(runtime_folder())
    assert found == {tmp_path / f"heretic-{os.getuid()}"}


def test_runtime_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(locks, "TEMPORARY", tmp_path)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 12345)
    folder = tmp_path / f"heretic-{os.getuid()}"
    folder.mkdir()
    with raises("lock-unavailable"):
        runtime_folder()
    folder.rmdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    folder.symlink_to(mine)
    with raises("lock-unavailable"):
        runtime_folder()


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises("lock-unavailable"), acquire_locks([tmp_path / "file" / "cpu.lock"], model=""):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with raises("lock-unavailable") as error, acquire_locks([tmp_path / "run" / "lock"], model=""):
        pass
    assert "runs_dir" in str(error.value.fix)


def test_no_temporary_folder_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(locks, "TEMPORARY", Path("/missing"))
    monkeypatch.setattr(locks.tempfile, "gettempdir", full)
    with raises("lock-unavailable"):
        runtime_folder()
