"""Relative paths in a run's settings: they start at the folder that the run was started in, also when it is used from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from heretic.settings import Settings
from heretic.settings.sources import Resolved
from heretic.storage.url import sqlite_file, with_file

ALWAYS_PATHS = ("save_to", "artifacts")  # which are created; others may be names on the hub


def start_folder(run: Path, runs_dir: str) -> Path | None:
    """Return the folder that holds a run's relative `runs_dir`: where it was started, or where that folder is now; else None."""
    parts, above = Path(os.path.normpath(runs_dir)).parts, Path(os.path.abspath(run)).parent
    if Path(runs_dir).is_absolute() or {"..", "~"} & set(parts) or above.parts[-len(parts) :] != parts:
        return None
    return Path(*above.parts[: -len(parts)])


def with_absolute_paths(resolved: Resolved, run: Path, values: Mapping[str, Any]) -> Resolved:
    """Return a run's settings as they mean the same in the current folder.

    Args:
        resolved: the settings, with origins; what does not come from the run's file stays.
        run: the run's folder.
        values: the content of its config.toml.
    """
    runs_dir = str(values.get("runs_dir") or Settings.model_fields["runs_dir"].default)
    base = start_folder(run, runs_dir)
    if base is None:
        return resolved
    shortened = {str(base / runs_dir): runs_dir}

    def located(text: str, key: str) -> str:
        from_file = resolved.origin(key).startswith(f"{resolved.file}:")
        if not text or not from_file or Path(text).is_absolute() or text.startswith("~") or base == Path.cwd():
            return text
        if key not in ALWAYS_PATHS and not (base / text).exists():  # the name of a hub model
            return text
        shortened[str(base / text)] = text
        return str(base / text)

    return replace(resolved, settings=_with_paths(resolved.settings, located), shortened=shortened)


def with_relative_paths(resolved: Resolved, run: Path) -> Resolved:
    """Return the settings for a run's config.toml, so that its paths mean the same later.

    They are relative as before if they start at the folder that the run was started in, which may be moved or copied; what
    starts elsewhere becomes absolute, and everything where that folder cannot be found again.
    """
    shortened = resolved.shortened
    runs_dir = shortened.get(os.path.abspath(resolved.settings.runs_dir), resolved.settings.runs_dir)
    here = start_folder(run, runs_dir) == Path.cwd()

    def saved(text: str, key: str) -> str:
        if text in shortened:
            return shortened[text]
        if here or not text or Path(text).is_absolute() or text.startswith("~"):
            return text
        return os.path.abspath(text) if key in ALWAYS_PATHS or Path(text).exists() else text

    settings = _with_paths(resolved.settings, saved)
    return replace(resolved, settings=settings.model_copy(update={"runs_dir": runs_dir}))


def _with_paths(settings: Settings, change: Callable[[str, str], str]) -> Settings:
    """Change the settings that can be paths. Files of scorers and judges stay: the fingerprint has their names."""
    model = change(settings.model, "model")
    prompts = {
        role: source.model_copy(update={"source": change(source.source, f"prompts.{role}.source")})
        for role, source in settings.prompts
    }
    update: dict[str, Any] = {
        name: change(getattr(settings, name), name) for name in ("chat_template", "gguf_converter", "save_to")
    }
    file = sqlite_file(settings.storage) if settings.storage else None
    if file is not None and (changed := change(str(file), "storage")) != str(file):
        update["storage"] = with_file(settings.storage, changed)
    if settings.artifacts and "://" not in settings.artifacts:
        update["artifacts"] = change(settings.artifacts, "artifacts")
    update["trust_remote_code"] = [model if name == settings.model else name for name in settings.trust_remote_code]
    return settings.model_copy(
        update={**update, "model": model, "prompts": settings.prompts.model_copy(update=prompts)}
    )
