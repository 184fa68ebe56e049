"""Settings of a run that mean the same in every current folder."""

from __future__ import annotations

import os
from pathlib import Path

from heretic.files import expand_user
from heretic.settings import Settings
from heretic.storage.url import sqlite_file


def with_absolute_paths(settings: Settings) -> Settings:
    """Return the settings with absolute paths; those below the home folder begin with `~`.

    Files of scorers and of judges stay as they are: their names are part of the study's fingerprint.
    """
    model = _absolute(settings.model)
    prompts = {
        role: source.model_copy(update={"source": _absolute(source.source)}) for role, source in settings.prompts
    }
    file = sqlite_file(settings.storage) if settings.storage else None
    changed = {
        "model": model,
        "trust_remote_code": [model if name == settings.model else name for name in settings.trust_remote_code],
        "prompts": settings.prompts.model_copy(update=prompts),
        "chat_template": _absolute(settings.chat_template),
        "gguf_converter": _absolute(settings.gguf_converter),
        "save_to": _absolute(settings.save_to, new=True),
    }
    if file is not None and settings.storage == f"sqlite:///{file}":
        changed["storage"] = f"sqlite:///{os.path.abspath(file)}"
    return settings.model_copy(update=changed)


def _absolute(text: str, *, new: bool = False) -> str:
    """Return the absolute path of an existing file or folder, or of a new one; other texts stay."""
    path = expand_user(text)
    if not text or path.is_absolute() or not (new or path.exists()):
        return text
    absolute, home = Path(os.path.abspath(path)), Path(os.path.expanduser("~"))
    if len(home.parts) > 1 and absolute.is_relative_to(home):
        return f"~/{absolute.relative_to(home)}"
    return str(absolute)
