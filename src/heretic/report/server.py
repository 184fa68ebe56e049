"""The report as a live page on loopback: progress, front, trials and log, from the storage alone; and a chat with the trials.

The address holds a secret token, requests must name a loopback host (against DNS rebinding), and actions need a header that no
page of another site can send.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from heretic.errors import UserError
from heretic.files import open_private
from heretic.hardware import locks
from heretic.report.chat import ChatModel, Question
from heretic.report.report import load_report_input, report
from heretic.runs.folder import RunFolder
from heretic.runs.status import read_status

LOOPBACK = "127.0.0.1"
SECONDS_BETWEEN_EVENTS = 1.0
LOG_LINES = 30
MOST_BODY = 4 << 20  # bytes of a question with its conversations
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "frame-src 'self'"
)


class LiveRun:
    """What the page shows of one run, and what it can do with it."""

    def __init__(self, folder: RunFolder, runs_dir: str, environment: Mapping[str, str], chat: ChatModel) -> None:
        self.folder, self.runs_dir, self.environment, self.chat = folder, runs_dir, environment, chat
        self._lock = threading.Lock()
        self._stopping = 0  # the process that was asked to stop
        self._report: tuple[str, bytes] = ("", b"")

    def state(self) -> dict[str, Any]:
        """Return status, log, possible actions, the state of the chat, and the version of the report."""
        status, problem = None, ""
        try:
            status = read_status(str(self.folder.path), self.runs_dir, self.environment).as_dict()
        except UserError as error:
            problem = str(error)
        owner, chat = self.owner(), self.chat.state()
        finished = status is not None and status["ended"] is not None
        return {
            "status": status,
            "problem": problem,
            "log": self.folder.log_end(LOG_LINES),
            "can_stop": owner is not None and owner != self._stopping,
            "can_continue": owner is None and chat["phase"] == "off" and status is not None and not finished,
            "chat": chat,
            "version": f"{status['n_complete']}+{status['n_pruned']}" if status else "",
        }

    def page(self) -> bytes:
        """Return the report of the present state; it is made once for every finished trial. Raises UserError."""
        version = self.state()["version"]
        with self._lock:
            if self._report[0] != version or not version:
                source = load_report_input(str(self.folder.path), self.runs_dir, self.environment, with_texts=False)
                self._report = (version, report(source).encode())
            return self._report[1]

    def owner(self) -> int | None:
        """Return the other process on this machine that works on the run; None if there is none."""
        owner = locks.lock_owner(self.folder.lock)
        if owner is None or not owner.known or owner.is_this_process:  # this process holds it while its chat is loaded
            return None
        return owner.pid if owner.host == socket.gethostname() else None

    def stop(self) -> None:
        """Ask the process that works on the run, once, to stop after its batch. Raises UserError.

        SIGTERM: a process started in the background can ignore Ctrl-C's SIGINT, and on a terminal that would open its menu.
        """
        pid = self.owner()
        if pid is None or pid == self._stopping:
            raise UserError(
                "No process on this machine works on the run.", code="run-not-active", where=str(self.folder.path)
            )
        self._stopping = pid
        os.kill(pid, signal.SIGTERM)

    def resume(self) -> None:
        """Continue the run in a process of its own, which outlives this server. Raises UserError."""
        if not self.state()["can_continue"]:
            raise UserError("The run is complete or in use.", code="run-not-resumable", where=str(self.folder.path))
        output = open_private(self.folder.path / "serve.log", "a")
        try:
            subprocess.Popen(
                [sys.executable, "-m", "heretic", "run", str(self.folder.path), "--no-menu", "--plain"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        finally:
            os.close(output)


class LiveServer(ThreadingHTTPServer):
    """Serves one run on a loopback port until `shutdown`."""

    daemon_threads = True

    def __init__(self, run: LiveRun, port: int = 0) -> None:
        self.run, self.token = run, secrets.token_urlsafe(24)
        super().__init__((LOOPBACK, port), _Handler)

    def server_close(self) -> None:
        """Stop listening and release the chat's model."""
        super().server_close()
        self.run.chat.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that goes away while it is answered."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address of the page, with the token."""
        return f"http://{LOOPBACK}:{self.port}/{self.token}/"

    @cached_property
    def shell(self) -> bytes:
        """The page around the report."""
        return resources.files("heretic.report").joinpath("live.html").read_bytes()


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing: the address holds the token."""

    def do_GET(self) -> None:
        """Answer the page, the report, or the stream of events."""
        path = self._path()
        if path == "":
            self._send(self.server.shell, "text/html; charset=utf-8")
        elif path == "report":
            self._attempt(lambda: self._send(self.server.run.page(), "text/html; charset=utf-8", framed=True))
        elif path == "events":
            self._events()
        elif path is not None:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Stop or continue the run; load, ask, stop or unload the chat's model."""
        run, chat = self.server.run, self.server.run.chat
        actions = {
            "stop": run.stop,
            "continue": run.resume,
            "chat/load": chat.load,
            "chat/stop": chat.stop,
            "chat/unload": chat.unload,
        }
        path = self._path()
        if path is None:
            return
        if path not in (*actions, "chat/ask") or self.headers.get("X-Heretic") != "yes":
            self.send_error(HTTPStatus.FORBIDDEN)
            return

        def act() -> None:
            actions[path]()
            self._send(b"", "text/plain; charset=utf-8")

        self._attempt(self._answer if path == "chat/ask" else act)

    def _path(self) -> str | None:
        """Return the path behind the token; None, after the answer, if token or host are wrong."""
        hosts = {f"{name}:{self.server.port}" for name in (LOOPBACK, "localhost")}
        first, _, rest = self.path.partition("?")[0].lstrip("/").partition("/")
        if self.headers.get("Host") not in hosts or not secrets.compare_digest(
            first.encode(), self.server.token.encode()
        ):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        return rest

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except UserError as error:
            self._send(str(error).encode(), "text/plain; charset=utf-8", HTTPStatus.CONFLICT)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, *, framed: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        if not framed:  # the report brings its own policy
            self.send_header("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'")
        self.end_headers()
        self.wfile.write(body)

    def _events(self) -> None:
        """Send the state whenever it changes, until the browser goes away."""

        def states() -> Generator[dict[str, Any] | None]:
            last = None
            while True:
                state = self.server.run.state()
                yield state if state != last else None
                last = state
                time.sleep(SECONDS_BETWEEN_EVENTS)

        self._stream(states())

    def _answer(self) -> None:
        """Send the answers to a question while they grow; if the browser goes away, they end. Raises UserError."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BODY:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        self._stream(self.server.run.chat.answer(Question.read(self.rfile.read(int(length)))))

    def _stream(self, events: Generator[dict[str, Any] | None]) -> None:
        """Send server-sent events; None, a sign of life, shows whether the browser is still there."""
        self.close_connection = True
        with closing(events), suppress(OSError):
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Connection", "close")
            self.end_headers()
            for event in events:
                self.wfile.write(b": still here\n\n" if event is None else f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()


def open_server(
    folder: RunFolder, runs_dir: str, environment: Mapping[str, str], chat: ChatModel, port: int = 0
) -> LiveServer:
    """Return a server of a run, listening. Raises UserError if the port is taken."""
    try:
        return LiveServer(LiveRun(folder, runs_dir, environment, chat), port)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"heretic cannot listen on port {port}: {error}",
            code="port-unavailable",
            where="--port",
            fix="choose another port, or leave --port out",
        ) from None
