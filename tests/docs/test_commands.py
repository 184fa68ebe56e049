"""docs/commands has a page for every command, with every option, and the exit statuses."""

from __future__ import annotations

import re
from pathlib import Path

import click
import typer.main

from heretic import cli
from heretic.errors import EXIT_STATUSES, Interrupted, UserError

PAGES = Path(__file__).parents[2] / "docs" / "commands"


def pages() -> dict[str, str]:
    """The pages' text by command; each page begins with the command that it is about."""
    texts = {p.stem: p.read_text(encoding="utf-8") for p in PAGES.glob("*.md") if p.name != "README.md"}
    assert all(text.startswith(f"# heretic {name}") for name, text in texts.items())
    return texts


def test_every_command_and_option_is_documented() -> None:
    group = typer.main.get_command(cli.app)
    assert hasattr(group, "commands")
    written = pages()
    missing = [f"heretic {name}" for name in group.commands if name not in written]
    for name, command in group.commands.items():
        for parameter in command.params:
            longest = max(parameter.opts, key=len)
            if longest.startswith("--") and longest != "--help" and f"`{longest}" not in written.get(name, ""):
                missing.append(f"heretic {name} {longest}")
    assert not missing, f"docs/commands does not name: {', '.join(missing)}"


def test_nothing_is_documented_that_does_not_exist() -> None:
    group = typer.main.get_command(cli.app)
    known = {name: {o for p in command.params for o in p.opts} for name, command in group.commands.items()}  # type: ignore[attr-defined]
    for name, text in pages().items():
        assert name in known, f"there is no command {name}"
        rows = [line for line in text.splitlines() if line.startswith("| `--")]
        for option in re.findall(r"`(--[\w-]+)", " ".join(row.split("|")[1] for row in rows)):
            assert option in known[name], f"heretic {name} has no {option}"


def test_every_exit_status_is_documented_and_used() -> None:
    page = (PAGES / "README.md").read_text(encoding="utf-8")
    assert {int(n) for n in re.findall(r"^\| (\d+) \| ", page, flags=re.MULTILINE)} == set(EXIT_STATUSES)
    kinds = [UserError, *UserError.__subclasses__(), Interrupted]
    assert {kind.exit_status for kind in kinds} | {0, click.UsageError.exit_code} == set(EXIT_STATUSES)
