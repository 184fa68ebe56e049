"""The map in ARCHITECTURE.md names every file of the package, and no other."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

PACKAGE = ROOT / "src/heretic"


def mapped_files() -> set[str]:
    """Return the files that the map names, relative to the package."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### `(?:src/heretic/|(\w+/))`\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    return {room + name for room, body in sections for name in re.findall(r"`([\w/]+\.py)`", body)}


def test_the_map_names_every_file_of_the_package() -> None:
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    own = {name for name in files if not name.rpartition("/")[2].startswith("_")}
    assert not own - mapped_files(), "add them to the map in ARCHITECTURE.md"
    assert not mapped_files() - files, "the map names files that do not exist"
