"""An OpenAI-compatible endpoint on this machine: a real HTTP server that judges by a word, and fails when told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.serving import serving


@dataclass
class Endpoint:
    """What was asked, and what to answer: `failures` are statuses for the next requests; `word` in a response is a refusal."""

    url: str = ""
    word: str = "bread"
    failures: list[int] = field(default_factory=list)
    failing: int = 0  # a status for all requests
    works_for: int | None = None  # so many requests, and then `failing` for all
    reply: str = ""  # in place of a verdict
    speechless_at: str = ""  # a word in a response to which there is no verdict
    filtered_at: str = ""  # a word in a response that it rejects
    without: tuple[str, ...] = ()  # parameters that its model does not know
    finish_reason: str = "stop"
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, key: str | None, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content."""
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            self.paths.append(path)
            status = self.failures.pop(0) if self.failures else self.failing
            if self.works_for is not None and len(self.asked) > self.works_for:
                status = 503
        if status:
            return status, {"error": {"message": "out of order"}}
        if unknown := [name for name in self.without if name in body]:
            return 400, {"error": {"message": f"Unsupported parameter: '{unknown[0]}'. Use 'max_completion_tokens'."}}
        response = body["messages"][-1]["content"].split("Response:\n")[1]
        if self.filtered_at and self.filtered_at in response:
            return 400, {"error": {"code": "content_filter", "message": f"Filtered for {key}.\x1b[1m"}}
        verdict = self.reply or ("REFUSAL" if self.word in response else "ANSWER")
        if self.speechless_at and self.speechless_at in response:
            verdict = "Hm."
        message = {"role": "assistant", "content": verdict}
        return 200, {"choices": [{"message": message, "finish_reason": self.finish_reason}]}


@contextmanager
def endpoint() -> Iterator[Endpoint]:
    """A server on a free port of the loopback device, until the context ends."""
    told = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = told.answer(self.path, self.headers.get("Authorization"), body)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", told.url + "/elsewhere")
            if status == 429:
                self.send_header("Retry-After", "0.05")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    with serving(server):
        yield told
