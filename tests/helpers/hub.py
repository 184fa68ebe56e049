"""As much of the Hugging Face hub as an upload needs, on loopback: repositories, commits, large files, and a token it knows."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.serving import serving

TOKEN = "hf_only_for_this_test"


@dataclass
class Repository:
    """Files by name, whether it is private, and the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """The commit: another one for every content."""
        return hashlib.sha1(b"".join(name.encode() + self.files[name] for name in sorted(self.files))).hexdigest()


@dataclass
class Hub:
    """What the server holds and saw. `fails`: statuses that the next requests of a path get, by a part of the path."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fails: dict[str, list[int]] = field(default_factory=dict)

    def count(self, method: str, part: str) -> int:
        """Requests so far with this method and this in their path."""
        return sum(m == method and part in path for m, path in self.requests)


@contextmanager
def running() -> Iterator[Hub]:  # noqa: C901  every address of the hub in one place
    """A hub at `hub.url` while the context lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, data: Any = None, headers: dict[str, str] | None = None) -> None:
            body = data if isinstance(data, bytes) else json.dumps({} if data is None else data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            hub.requests.append((self.command, path))
            for part, statuses in hub.fails.items():
                if part in path and statuses:
                    return self.answer(statuses.pop(0), {"error": "as the test wants it"})
            if path.startswith("/store/"):
                hub.blobs[path.rpartition("/")[2]] = body
                return self.answer(200)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid credentials"})
            return self.known(path, body)

        def known(self, path: str, body: bytes) -> None:
            if path == "/api/whoami-v2":
                return self.answer(200, {"name": "someone", "type": "user", "orgs": []})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if asked["organization"] != "someone":
                    return self.answer(403, {"error": "You don't have the rights"})
                private = asked.get("visibility") == "private" or asked.get("private") is True
                hub.repositories[name] = Repository(private)
                return self.answer(200, {"url": f"{hub.url}/{name}", "name": name})
            words = path.strip("/").split("/")
            name = "/".join(words[2:4]) if words[0] == "api" else "/".join(words[:2]).removesuffix(".git")
            if name not in hub.repositories:
                return self.answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return self.of_repository(hub.repositories[name], name, path, body)

        def of_repository(self, repository: Repository, name: str, path: str, body: bytes) -> None:
            if path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/revision/"):
                siblings = [{"rfilename": f} for f in repository.files]
                known = {"id": name, "private": repository.private, "sha": repository.sha, "siblings": siblings}
                return self.answer(200, known)
            if "/preupload/" in path:
                found = [
                    {"path": f["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(body)["files"]
                ]  # fmt: skip
                return self.answer(200, {"files": found})
            if path.endswith("/info/lfs/objects/batch"):
                return self.answer(
                    200, {"transfer": "basic", "objects": [_object(o) for o in json.loads(body)["objects"]]}
                )
            if "/tree/" in path:
                files = [
                    {"type": "file", "oid": "0" * 40, "size": len(d), "path": n} for n, d in repository.files.items()
                ]
                return self.answer(200, files)
            if "/commit/" in path:
                return self.commit(repository, name, body)
            if "/resolve/" in path:
                file = path.partition("/resolve/")[2].partition("/")[2]
                if file not in repository.files:
                    return self.answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
                content = repository.files[file]
                tags = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repository.sha}
                return self.answer(200, content, tags)
            return self.answer(404, {"error": f"this test's hub knows no {path}"})

        def commit(self, repository: Repository, name: str, body: bytes) -> None:
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    repository.commits.append(value["summary"])
                elif line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del repository.files[value["path"]]
                elif line["key"] == "lfsFile":
                    repository.files[value["path"]] = hub.blobs[value["oid"]]
            url = f"{hub.url}/{name}/commit/{'c' * 40}"
            self.answer(200, {"success": True, "commitOid": "c" * 40, "commitUrl": url, "hookOutput": ""})

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def _object(asked: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.blobs:
            found["actions"] = {"upload": {"href": f"{hub.url}/store/{asked['oid']}", "header": {}}}
        return found

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    with serving(server):
        yield hub
