"""One Markdown file for a bug report: environment, settings, status and log, without prompts and secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from heretic.errors import UserError
from heretic.runs.folder import find_run
from heretic.runs.status import read_status
from heretic.storage.url import masked

LOG_LINES = 200


def bug_report(collected: Mapping[str, Any], name: str, runs_dir: str, environment: Mapping[str, str]) -> str:
    """Return the file.

    Args:
        collected: the result of `environment.collect`.
        name: name or folder of a run; empty: the latest, or none if there is no run.
        runs_dir: the folder of runs.
        environment: environment variables.

    Raises:
        UserError: if a named run does not exist.
    """
    facts = {key: value for key, value in collected.items() if key != "settings"}
    sections = [
        ("Environment", json.dumps(facts, indent=2)),
        ("Settings", str(collected["settings"])),
        *_of_run(name, runs_dir, environment),
    ]
    blocks = [f"## {title}\n\n````text\n{text.rstrip()}\n````\n" for title, text in sections]
    return "# Bug report of heretic\n\nWhat happened, and what you expected:\n\n" + "\n".join(blocks)


def _of_run(name: str, runs_dir: str, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    try:
        folder = find_run(name, runs_dir)
    except UserError as error:
        if name:
            raise
        return [("Run", error.what)]
    try:
        status = json.dumps(read_status(str(folder.path), runs_dir, environment).as_dict(), indent=2)
    except UserError as error:
        status = str(error)
    log = folder.log_end(LOG_LINES) or ["none"]
    return [(f"Status of {folder.name}", status), ("run.log, the end", "\n".join(map(masked, log)))]
