"""The URL of a study's storage: what it is, what it names, and how it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy

from heretic.errors import UserError

SECRET = re.compile(r"((?:^|(?<=&))[^=&]*(?:pass|pwd|secret|token|key|auth|cred)[^=&]*=)[^&]*", re.IGNORECASE)


def storage_url(storage: str, folder: Path) -> str:
    """The URL of the study's storage. Raises UserError for a folder that a URL cannot name."""
    if storage:
        return storage
    file = (folder / "study.db").resolve()
    if "?" in str(file):  # what follows it would be taken for options
        raise UserError(
            "The path of a run's folder must not contain a question mark.",
            code="invalid-run-path",
            where=str(folder),
            fix="choose another run_name or runs_dir",
        )
    return f"sqlite:///{file}"


def study_name(storage: str, folder: Path) -> str:
    """The study's name: fixed in a run's own file, so that a renamed folder stays readable; the run's name where shared."""
    return folder.name if storage else "heretic"


def masked(url: str) -> str:
    """A storage URL without its password and whatever else in it may be a secret, for messages and manifests."""
    # A password may hold any character, unescaped ones too: it ends at the last @. Rather too much is masked than too little.
    place, mark, query = re.sub(r"://([^:/@]*):.*@", r"://\1:***@", url, flags=re.DOTALL).partition("?")
    return place + mark + SECRET.sub(r"\1***", query)


def on_server(url: str) -> bool:
    """Whether a storage can have workers on several machines."""
    return bool(url) and not url.startswith("sqlite")


def sqlite_file(url: str) -> Path | None:
    """The file of a storage in SQLite, which a URL may also name as a URI of its own (`sqlite:///file:PATH?uri=true`); None for
    any other storage."""
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database.removeprefix("file:"))
