"""The few calls of S3 that an artifact store makes, served from memory on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.helpers.serving import serving


@contextmanager
def s3_server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its address, and what it holds by path (`/bucket/key`)."""
    held: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            held[self.path] = self._body()
            self._answer(200)

        def do_GET(self) -> None:
            found = held.get(self.path)
            missing = b"<Error><Code>NoSuchKey</Code><Message>not here</Message></Error>"
            self._answer(200 if found is not None else 404, missing if found is None else found)

        def do_DELETE(self) -> None:
            held.pop(self.path, None)
            self._answer(204)

        def _body(self) -> bytes:
            """As it is, or in aws-chunked pieces with signatures or checksums around them."""
            if self.headers.get("Expect"):
                self.send_response_only(100)
                self.end_headers()
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
                return raw
            whole = b""
            while raw:
                size, _, raw = raw.partition(b"\r\n")
                length = int(size.split(b";")[0], 16)
                if not length:
                    break
                whole, raw = whole + raw[:length], raw[length + 2 :]
            return whole

        def _answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}", held
