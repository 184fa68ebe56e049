"""The documents, and what is taken out of them: code blocks, command lines, text in backticks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from heretic.cli.main import shorthand
from heretic.cli.options import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
HISTORY = ("CHANGELOG.md",)  # tells of what was, too
NOW = [page for page in PAGES if page.name not in HISTORY]


def named(page: Path) -> str:
    """For the names of tests."""
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks; indented ones have no language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    without = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:^    \S.*\n?)+", without, re.M)
    return [*fenced, *(("", "\n".join(line[4:] for line in block.splitlines())) for block in indented)]


def lines_of_code(page: Path) -> list[str]:
    """Every line of every block, without what a shell would not read."""
    found = (line for _, block in blocks(page.read_text(encoding="utf-8")) for line in block.splitlines())
    return [line.partition(" #")[0].strip().removeprefix("$ ") for line in found]


def quoted(page: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def commands() -> dict[str, Any]:
    """The program's commands by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def arguments_of(line: str) -> list[str] | None:
    """A line that calls the program as its arguments, the command first; None for any other line, and for `heretic COMMAND`."""
    found = re.match(r"(?:[A-Z_]+=\S+ )*(?:\S+ -m |\.venv/bin/)?heretic(?: ([^|>&;]*))?$", line)
    if not found:
        return None
    plain = re.sub(r"[…\[\]]|\.\.\.", " ", found[1] or "")  # what may be left out is tried as well
    words = shlex.split(re.sub(r"\bN\b", "3", plain))
    if not words or words[0] in ("COMMAND", "--version", "-V", "--install-completion", "--show-completion", "--help"):
        return None
    return shorthand(words, list(commands()))
