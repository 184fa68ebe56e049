"""A PostgreSQL server of its own for a test: a new cluster on a free port of the loopback address, run by an unprivileged user."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "not-to-be-seen"
USERS = ("postgres", "nobody")  # the server refuses to run as root


def programs() -> Path | None:
    """The folder with initdb and pg_ctl; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


@dataclass
class Server:
    """A running server; its database is `study`, its user `heretic`."""

    bin: Path
    data: Path
    port: int
    options: str = ""

    @property
    def url(self) -> str:
        """For the setting `storage`, with the password."""
        return f"postgresql://heretic:{PASSWORD}@127.0.0.1:{self.port}/study"

    def control(self, *arguments: str) -> None:
        """pg_ctl."""
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off {self.options}"
        )
        command = [str(self.bin / "pg_ctl"), "-D", str(self.data), "-w", "-l", str(self.data / "log"), "-o", options]
        subprocess.run([*command, *arguments], check=True, capture_output=True, cwd="/", **_unprivileged())  # type: ignore[call-overload]

    def ask(self, sql: str) -> list[tuple[object, ...]]:
        """Rows of a query."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []


def _unprivileged() -> dict[str, object]:
    if os.getuid() != 0:
        return {}
    user = next(u for u in USERS if _exists(u))
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def _exists(user: str) -> bool:
    try:
        return bool(pwd.getpwnam(user))
    except KeyError:
        return False


@contextmanager
def server(options: str = "") -> Iterator[Server]:
    """A new cluster, started with these options; stopped and deleted at the end."""
    where = programs()
    assert where is not None
    folder = Path(tempfile.mkdtemp(prefix="heretic-postgres-"))
    try:
        if os.getuid() == 0:
            os.chown(folder, pwd.getpwnam(next(u for u in USERS if _exists(u))).pw_uid, -1)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        made = Server(where, folder / "data", _free_port(), options)
        arguments = [
            "-U",
            "heretic",
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        ]
        initdb = [str(where / "initdb"), "-D", str(made.data), *arguments]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/", **_unprivileged())  # type: ignore[call-overload]
        made.control("start")
        try:
            import psycopg

            with psycopg.connect(made.url.removesuffix("study") + "postgres", autocommit=True) as connection:
                connection.execute("create database study")
            yield made
        finally:
            made.control("stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
