"""The commit of a hub model that a run began with, so that the run continues with it after the hub has a newer one."""

from __future__ import annotations

import re
from pathlib import Path

from heretic.errors import UserError
from heretic.runs.folder import RunFolder, existing_runs, load_settings
from heretic.settings import Settings

COMMIT = re.compile("[0-9a-f]{40}")
NOT_COMPARED = {"model", "revision", "runs_dir", "run_name"}


def with_commit(settings: Settings, commit: str | None) -> Settings:
    """Return the settings to store with a run: `revision` names the commit that its hub model was loaded from."""
    if not commit or COMMIT.fullmatch(settings.revision):
        return settings
    return settings.model_copy(update={"revision": commit})


def begun_commit(settings: Settings) -> str:
    """Return the commit of the hub model in the run that these settings continue; "" if they name a revision or there is none.

    Without `run_name` it is the last run of this model whose other settings are the same.
    """
    root = Path(settings.runs_dir)
    if settings.revision or Path(settings.model).exists():
        return ""
    folders = [root / settings.run_name] if settings.run_name else reversed(existing_runs(root))
    for folder in folders:
        stored = _stored(folder)
        if stored is None or stored.model != settings.model or not COMMIT.fullmatch(stored.revision):
            continue
        if settings.run_name or _compared(stored) == _compared(settings):
            return stored.revision
    return ""


def _stored(folder: Path) -> Settings | None:
    try:
        return load_settings(RunFolder(folder), {})
    except (UserError, OSError):  # no run, or one of another version
        return None


def _compared(settings: Settings) -> dict[str, object]:
    return {key: value for key, value in settings.fingerprint_fields().items() if key not in NOT_COMPARED}
