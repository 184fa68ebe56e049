"""Storage URLs: construction, parsing and masking of secrets."""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy

from heretic.errors import UserError

SECRET = re.compile(r"((?:^|(?<=&))[^=&]*(?:pass|pwd|secret|token|key|auth|cred)[^=&]*=)[^&]*", re.IGNORECASE)


def storage_url(storage: str, folder: Path) -> str:
    """Return the URL of the study's storage. Raises UserError if the folder cannot be part of a URL."""
    if storage:
        return storage
    file = (folder / "study.db").resolve()
    if "?" in str(file):  # the rest would be parsed as options
        raise UserError(
            "The path of a run's folder must not contain a question mark.",
            code="invalid-run-path",
            where=str(folder),
            fix="choose another run_name or runs_dir",
        )
    return f"sqlite:///{file}"


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
    """Return the file of a SQLite storage, also from a URI (`sqlite:///file:PATH?uri=true`); None for other storages."""
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database.removeprefix("file:"))
