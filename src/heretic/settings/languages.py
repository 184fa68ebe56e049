"""Languages of the setting `language`: refusal and evasive phrases, and small prompt sets that heretic's authors wrote.

A language is a file in `data/languages` and a line in `LANGUAGES`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENGLISH = "en"
LANGUAGES = {
    ENGLISH: "English",
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "pt": "Portuguese",
    "zh": "Chinese",
}


@dataclass(frozen=True)
class Language:
    """What a language adds to the English phrases of the settings; English itself adds nothing."""

    refusal_markers: tuple[str, ...] = ()
    evasive_markers: tuple[str, ...] = ()
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by role, such as harmful_train


def known_language(code: str) -> str:
    """Return the code; raise ValueError for one that is not in the table."""
    if code not in LANGUAGES:
        raise ValueError(f"it should be one of: {', '.join(LANGUAGES)}")
    return code


@cache
def language(code: str) -> Language:
    """Return a language of the table."""
    if known_language(code) == ENGLISH:
        return Language()
    file = resources.files("heretic") / "data" / "languages" / f"{code}.toml"
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    prompts = {role: tuple(texts) for role, texts in table["prompts"].items()}
    return Language(tuple(table["refusal_markers"]), tuple(table["evasive_markers"]), prompts)
