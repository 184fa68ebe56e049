"""Read the entries of a base model's card that hold for a derived model too: license, languages, task."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from heretic.export.markdown import escape, is_url
from heretic.model.repository import CARD, resolve_inside

LARGEST = 4 << 20  # bytes; cards have a few kilobytes
TASKS = ("text-generation", "image-text-to-text", "video-text-to-text", "audio-text-to-text", "any-to-any")
MOST = 300  # languages


@dataclass(frozen=True)
class BaseCard:
    """The validated entries of a base model's card; nothing else of it reaches the new card."""

    entries: dict[str, Any] = field(default_factory=dict)
    found: bool = True  # whether there is a card

    @property
    def terms(self) -> str:
        """A sentence on the license, for the card's text."""
        name = self.entries.get("license_name") or self.entries.get("license")
        if not self.found:
            return "Its card was not beside the weights; look up its license, which applies to this model too."
        if not name:
            return "The base model's card names no license; its terms, if any, apply to this model too."
        named = escape(", ".join(name) if isinstance(name, list) else name)
        link = self.entries.get("license_link")
        return f"Its license, {f'[{named}]({link})' if is_url(link) else named}, applies to this model too."


def read_base_card(folder: Path) -> BaseCard:
    """Read the card of the model in a folder; empty if there is none or its head is not YAML.

    Raises:
        UserError: The card is a link to outside the folder.
    """
    file = resolve_inside(folder, folder / CARD)
    if not file.is_file():
        return BaseCard(found=False)
    if file.stat().st_size > LARGEST:
        return BaseCard()
    try:
        head = metadata_load(file) or {}
    except Exception:  # PyYAML and the hub's library raise many types
        return BaseCard()
    return BaseCard({key: value for key, check in KEPT.items() if (value := check(head.get(key))) is not None})


def _matching(pattern: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, list):
            return [kept for entry in value[:MOST] if (kept := single(entry)) is not None] or None
        return single(value)

    def single(value: Any) -> Any:
        value = "no" if value is False else value  # Norwegian, to YAML 1.1
        return value if isinstance(value, str) and re.fullmatch(pattern, value) else None

    return check


def _task(value: Any) -> str:
    return value if value in TASKS else TASKS[0]


def _one_of(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if isinstance(value, list) else check(value)


KEPT: dict[str, Callable[[Any], Any]] = {
    "license": _matching(r"[a-z0-9][a-z0-9.+-]{0,63}"),
    "license_name": _one_of(_matching(r"[\w][\w .+()-]{0,99}")),
    "license_link": _one_of(lambda value: value if is_url(value) or _matching(r"[\w][\w.-]{0,99}")(value) else None),
    "language": _matching(r"[A-Za-z][A-Za-z0-9_-]{1,30}"),
    "pipeline_tag": _task,
}
