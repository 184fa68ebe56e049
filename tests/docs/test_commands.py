"""docs/commands.md names every command with every option, and every exit status."""

from __future__ import annotations

import re
from pathlib import Path

import click
import typer.main

from heretic import cli
from heretic.errors import EXIT_STATUSES, Interrupted, UserError

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def sections() -> dict[str, str]:
    """The page's text by command."""
    parts = re.split(r"^## heretic ([\w-]+).*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.split("\n## ")[0] for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_every_command_and_option_is_documented() -> None:
    group = typer.main.get_command(cli.app)
    assert hasattr(group, "commands")
    written = sections()
    missing = [f"heretic {name}" for name in group.commands if name not in written]
    for name, command in group.commands.items():
        for parameter in command.params:
            longest = max(parameter.opts, key=len)
            if longest.startswith("--") and longest != "--help" and f"`{longest}" not in written.get(name, ""):
                missing.append(f"heretic {name} {longest}")
    assert not missing, f"docs/commands.md does not name: {', '.join(missing)}"


def test_nothing_is_documented_that_does_not_exist() -> None:
    group = typer.main.get_command(cli.app)
    known = {name: {o for p in command.params for o in p.opts} for name, command in group.commands.items()}  # type: ignore[attr-defined]
    for name, text in sections().items():
        assert name in known, f"there is no command {name}"
        rows = [line for line in text.splitlines() if line.startswith("| `--")]
        for option in re.findall(r"`(--[\w-]+)", " ".join(row.split("|")[1] for row in rows)):
            assert option in known[name], f"heretic {name} has no {option}"


def test_every_exit_status_is_documented_and_used() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert {int(n) for n in re.findall(r"^\| (\d+) \| ", page, flags=re.MULTILINE)} == set(EXIT_STATUSES)
    kinds = [UserError, *UserError.__subclasses__(), Interrupted]
    assert {kind.exit_status for kind in kinds} | {0, click.UsageError.exit_code} == set(EXIT_STATUSES)
