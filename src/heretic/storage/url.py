"""Storage URLs: construction, parsing and masking of secrets."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import sqlalchemy

from heretic.errors import UserError

SECRET = re.compile(r"((?:^|(?<=&))[^=&]*(?:pass|pwd|secret|token|key|auth|cred)[^=&]*=)[^&]*", re.IGNORECASE)


def storage_url(storage: str, folder: Path) -> str:
    """Return the URL of the study's storage. Raises UserError if the folder cannot be part of a URL."""
    if storage:
        return storage
    file = str((folder / "study.db").resolve())
    # SQLAlchemy takes what follows `?` for options, its version 2.1 decodes `%34`, and Optuna replaces `{...}`.
    for path in (file, re.sub("[%?{}]", lambda found: quote(found[0]), file)):
        url = f"sqlite:///{path}"
        if not set("{}") & set(url) and sqlalchemy.make_url(url).database == file:
            return url
    raise _invalid_path(str(folder), "run_name or runs_dir")


def study_name(storage: str, folder: Path) -> str:
    """Return the study's name: the run's name in a shared storage, else fixed, so that the folder can be renamed."""
    return folder.name if storage else "heretic"


def masked(url: str) -> str:
    """Mask the password and other possible secrets of a storage URL, for messages and manifests."""
    # A password may contain any unescaped character, so it ends at the last @. Masking too much is better than too little.
    location, mark, query = re.sub(r"://([^:/@]*):.*@", r"://\1:***@", url, flags=re.DOTALL).partition("?")
    return location + mark + SECRET.sub(r"\1***", query)


def on_server(url: str) -> bool:
    """Return whether a storage supports workers on several machines."""
    return bool(url) and not url.startswith("sqlite")


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite storage, also from a URI (`sqlite:///file:PATH?uri=true`); None for memory and servers."""
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        return None
    return Path(parsed.database.removeprefix("file:"))


def require_url(url: str) -> None:
    """Raise UserError if a storage is not a URL."""
    try:
        sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise UserError(
            "The storage is not a URL.",
            code="unsupported-storage",
            where=f"storage = {masked(url)!r}",
            fix="write it like postgresql://user@host/database or sqlite:///FILE, or omit it",
        ) from None


def with_file(url: str, file: str) -> str:
    """Return the URL of a SQLite storage with another file. Raises UserError if the file cannot be part of a URL."""
    parsed = sqlalchemy.make_url(url)
    scheme = "file:" if (parsed.database or "").startswith("file:") else ""
    changed = parsed.set(database=scheme + file).render_as_string(hide_password=False)
    if sqlite_file(changed) != Path(file) or set("{}") & set(changed):  # which Optuna replaces
        raise _invalid_path(file, "storage")
    return changed


def _invalid_path(path: str, setting: str) -> UserError:
    return UserError(
        "The path of a study must not contain question marks, braces or percent signs.",
        code="invalid-run-path",
        where=path,
        fix=f"choose another {setting}",
    )
