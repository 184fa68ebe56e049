"""A process that has imported heretic once and forks for every command that a test starts: an import takes 5 CPU seconds."""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import hashlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# Read when the libraries are imported: processes that differ in one of these are forked from servers of their own.
READ_AT_IMPORT = (
    "GOMP_", "HF_", "HOME", "HUGGINGFACE", "KMP_", "LANG", "LC_", "LD_", "MKL_", "OMP_", "PYTHON", "PYTORCH", "TMPDIR", "TORCH",
    "TRANSFORMERS", "TYPER_", "TZ", "XDG_CACHE_HOME",
)  # fmt: skip

NAME_TAKEN = 3  # exit status of a server whose name another one has
_started: list[subprocess.Popen[bytes]] = []  # they end when their standard input closes, with this process


def libraries_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the libraries read when they are imported."""
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


class ForkedProcess:
    """A `heretic` command in a fork of the server: as much of `subprocess.Popen` as the tests use."""

    def __init__(self, connection: socket.socket, pid: int, stdout: IO[str] | None) -> None:
        self._connection, self.pid, self.stdout = connection, pid, stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = _receive(self._connection)["status"]
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("heretic", timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Read its output to the end, then wait. Raises `subprocess.TimeoutExpired`."""
        assert self.stdout is not None
        end, read = time.monotonic() + timeout, []
        while select.select([self.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(self.stdout.fileno(), 1 << 16)
            if not part:
                self.stdout.close()
                self.wait(max(0.0, end - time.monotonic()))
                return b"".join(read).decode(errors="replace"), None
            read.append(part)
        raise subprocess.TimeoutExpired("heretic", timeout, b"".join(read))

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def fork_heretic(arguments: Sequence[str], environment: Mapping[str, str], output: Path | None = None) -> ForkedProcess:
    """Start `heretic ARGUMENTS` in this folder, with output and errors in one pipe or in this file."""
    reading = None
    if output is None:
        reader, writer = os.pipe()
        reading, writing = os.fdopen(reader), os.fdopen(writer, "w")
    else:
        writing = output.open("w")
    with open(os.devnull, encoding="utf-8") as nothing, writing:
        connection, pid = _fork(arguments, environment, [nothing.fileno(), writing.fileno(), writing.fileno()])
    return ForkedProcess(connection, pid, reading)


def fork_on_terminal(arguments: Sequence[str], environment: Mapping[str, str], terminal: int) -> ForkedProcess:
    """Start `heretic ARGUMENTS` in this folder as the leader of a session on this terminal."""
    connection, pid = _fork(arguments, environment, [terminal] * 3, leads_session=True)
    return ForkedProcess(connection, pid, None)


def _fork(
    arguments: Sequence[str], environment: Mapping[str, str], streams: list[int], *, leads_session: bool = False
) -> tuple[socket.socket, int]:
    variables = tuple(sorted(libraries_environment(environment).items()))
    request = {"arguments": arguments, "environment": dict(environment), "folder": os.getcwd(), "path": sys.path}
    for _ in range(3):  # a server may just be ending, with the process that had started it
        connection = _connect(variables)
        try:
            _send(connection, {**request, "leads_session": leads_session}, streams)
            return connection, _receive(connection)["pid"]
        except (OSError, ValueError):
            connection.close()
    raise RuntimeError("the fork server does not answer")


def _connect(environment: tuple[tuple[str, str], ...]) -> socket.socket:
    """Return a connection to the server for these variables, which all processes of a test run share; the first one starts it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    name = f"heretic-tests-{hashlib.sha256(repr((run, environment)).encode()).hexdigest()[:32]}"
    while True:
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(ConnectionRefusedError):
            connection.connect(_address(name))
            return connection
        connection.close()
        _start(name, environment)


def _start(name: str, environment: tuple[tuple[str, str], ...]) -> None:
    """Start a server, unless another process is about to, and wait for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.fork_server", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if not name.startswith(READ_AT_IMPORT)}
        | dict(environment),
    )
    assert process.stdout is not None
    if process.stdout.readline():  # it listens
        _started.append(process)
    else:
        assert process.wait() == NAME_TAKEN, f"it ended with {process.returncode}"
        time.sleep(0.5)  # the other one is importing


def _address(name: str) -> str:
    return f"\0{name}"  # abstract: no file is left


def _send(connection: socket.socket, message: Mapping[str, Any], descriptors: list[int] | None = None) -> None:
    data = json.dumps(message).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([len(data).to_bytes(4, "big")], ancillary)
    connection.sendall(data)


def _receive(connection: socket.socket, descriptors: array.array[int] | None = None) -> Any:
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4), socket.MSG_WAITALL)
    for _, _, data in ancillary:
        if descriptors is not None:
            descriptors.frombytes(data)
    return json.loads(connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for every request and report every exit status; returns the request in the forked process."""
    listener.listen()
    ended, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    print("listening", flush=True)
    watched: list[Any] = [listener, ended, 0]
    while running or 0 in watched:
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready:  # the test process has ended; processes of others may be running
            listener.close()
            watched, ready = [ended], [each for each in ready if each == ended]
        if ended in ready:
            os.read(ended, 1 << 12)
            _report_ended(running)
        if listener in ready:
            connection, _ = listener.accept()
            descriptors = array.array("i")
            try:
                request = _receive(connection, descriptors)
            except (OSError, ValueError):  # the starter has ended
                connection.close()
                continue
            try:
                pid = os.fork()
            except OSError:  # too many processes
                connection.close()
                continue
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, number)
                os.closerange(3, max(256, *descriptors) + 1)
                for kept in (listener, connection, *running.values()):
                    kept.detach()
                return dict(request)
            for descriptor in descriptors:
                os.close(descriptor)
            running[pid] = connection
            with contextlib.suppress(OSError):
                _send(connection, {"pid": pid})
    os._exit(0)


def _report_ended(running: dict[int, socket.socket]) -> None:
    """Tell the starters of the processes that have ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        connection = running.pop(pid)
        with contextlib.suppress(OSError):  # the starter may not wait for it
            _send(connection, {"status": os.waitstatus_to_exitcode(status)})
        connection.close()


def _import_everything() -> None:
    """Import what a study imports, also what it imports late; not `heretic.cli`, which looks at the terminal on import."""
    import importlib
    import pkgutil

    import heretic

    for module in pkgutil.walk_packages(heretic.__path__, "heretic."):
        if not module.name.startswith(("heretic.cli", "heretic.__main__")):
            importlib.import_module(module.name)
    for name in (
        "typer.main",
        "rich.live",
        "optuna.samplers._tpe.sampler",
        "optuna.storages._rdb.storage",
        "transformers.models.llama.modeling_llama",
        "sqlalchemy.orm",
        "sqlalchemy.dialects.sqlite",
        "sqlalchemy.dialects.postgresql",
        "alembic.command",
        "plotly.offline",
    ):
        importlib.import_module(name)


if __name__ == "__main__":
    named = socket.socket(socket.AF_UNIX)
    try:
        named.bind(_address(sys.argv[1]))
    except OSError:
        sys.exit(NAME_TAKEN)
    _import_everything()
    gc.collect()
    gc.freeze()  # or collections would copy the pages that the forks share
    asked = serve(named)
    if asked["leads_session"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # The server's own streams remember whether they could seek.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:] = asked["path"]
    sys.argv = ["heretic", *asked["arguments"]]
    runpy.run_module("heretic", run_name="__main__", alter_sys=True)
