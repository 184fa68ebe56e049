"""A run's own copy of its prompts: its trials stay usable when a prompt file changes or a data set is out of reach."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from heretic.errors import UserError
from heretic.files import LARGEST_TEXT, read_text, write_text
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets, load_all
from heretic.settings import PromptSettings
from heretic.settings.sources import Resolved

FILE = "prompts.json"


class _Copy(BaseModel):
    """The prompts and the settings that they were loaded by."""

    model_config = ConfigDict(extra="forbid")

    settings: PromptSettings
    sets: PromptSets


def store_prompts(folder: Path, settings: PromptSettings, prompts: PromptSets) -> None:
    """Store the prompts in the run's folder, unless they are very large. Raises UserError if the disk is full."""
    text = _Copy(settings=settings, sets=prompts).model_dump_json(exclude={"sets": {"warnings"}})
    if len(text) < LARGEST_TEXT // 4:  # a character has up to four bytes
        write_text(folder / FILE, text, private=True)


def stored_prompts(folder: Path, resolved: Resolved, reporter: ProgressReporter) -> PromptSets | None:
    """Return the run's stored prompts; None without them, or if the settings ask for others."""
    file, settings = folder / FILE, resolved.settings.prompts
    if not file.exists():
        return None
    try:
        stored = _Copy.model_validate_json(read_text(file))
    except (UserError, ValidationError):
        reporter.warning(f"{file} is damaged. heretic loads the prompts again.")
        return None
    as_in_file = {
        role: source.model_copy(update={"source": resolved.shortened.get(source.source, source.source)})
        for role, source in settings
    }
    return stored.sets if stored.settings == settings.model_copy(update=as_in_file) else None


def prompts_of_run(folder: Path, resolved: Resolved, reporter: ProgressReporter) -> PromptSets:
    """Return the run's stored prompts, or load them. Raises UserError."""
    return stored_prompts(folder, resolved, reporter) or load_all(resolved.settings.prompts)
