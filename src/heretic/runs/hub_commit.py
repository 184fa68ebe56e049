"""The commit of a hub model that a run began with, so that the run continues with it after the hub has a newer one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from heretic.errors import UserError
from heretic.runs.folder import RunFolder, existing_runs, load_settings
from heretic.runs.status import load_study
from heretic.settings import Settings
from heretic.settings.sources import Resolved
from heretic.storage import attributes

COMMIT = re.compile("[0-9a-f]{40}")
MOST = 5  # commits that are tried


def with_commit(settings: Settings, commit: str | None) -> Settings:
    """Return the settings to store with a run: `revision` names the commit that its hub model was loaded from."""
    if not commit or COMMIT.fullmatch(settings.revision):
        return settings
    return settings.model_copy(update={"revision": commit})


def without_commit(resolved: Resolved) -> Resolved:
    """Return a run's settings without the commit that `with_commit` stored; a revision that the user named stays."""
    if resolved.origin("revision") != "default":
        return resolved
    return replace(resolved, settings=resolved.settings.model_copy(update={"revision": ""}))


def known_commits(settings: Settings) -> list[str]:
    """Return the commits of the hub model in runs that these settings may continue, the last run first.

    None if the settings name a revision or a local model. With `run_name` it is the run of that name.
    """
    if settings.revision or Path(settings.model).exists():
        return []
    found = (s.revision for s in _stored(settings) if s.model == settings.model and COMMIT.fullmatch(s.revision))
    return list(islice(dict.fromkeys(found), MOST))


def _stored(settings: Settings) -> Iterator[Settings]:
    root = Path(settings.runs_dir)
    for folder in [root / settings.run_name] if settings.run_name else reversed(existing_runs(root)):
        with suppress(UserError, OSError):  # no run, or one of another version or user
            yield load_settings(RunFolder(folder), {})
    if settings.storage and settings.run_name:  # the run may have begun on another machine
        with suppress(UserError):
            if stored := attributes.settings_of(load_study(settings.storage, settings.run_name)):
                yield stored
