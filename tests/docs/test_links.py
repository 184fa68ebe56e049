"""Links and anchors of the documents resolve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, named


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    found = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#+ (.+)", line):
            text = re.sub(r"[^\w\- ]", "", match[1].lower().replace("`", ""))
            found.add(text.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "dev/LOG.md"], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = page if not name else (page.parent / name)
        assert other.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(other), f"{other.name} has no heading for #{anchor}"
