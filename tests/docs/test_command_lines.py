"""Every command line in the documents is one that the program, make or a script takes: options, values and settings."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from click import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from heretic.errors import SettingsError
from heretic.settings.sources import resolve
from tests.docs.pages import (
    NOW,
    PAGES,
    ROOT,
    arguments_of,
    blocks,
    commands,
    lines_of_code,
    named,
    quoted,
)

every_page = pytest.mark.parametrize("page", PAGES, ids=named)
every_page_of_today = pytest.mark.parametrize("page", NOW, ids=named)


def check_settings(assignments: list[str]) -> None:
    """That `--set` takes them; a value in capitals stands for one of the reader's."""
    resolve(assignments=[a for a in assignments if not re.fullmatch(r"\w+=[A-Z]+|KEY=VALUE", a)], environment={})


@every_page
def test_the_program_takes_its_command_lines(page: Path) -> None:
    known = commands()
    in_blocks = lines_of_code(page)
    for line in [*in_blocks, *quoted(page)]:
        if not (words := arguments_of(line)):
            continue
        assert words[0] in known, f"{line!r}: there is no command {words[0]}"
        try:
            context = known[words[0]].make_context(words[0], words[1:])
        except Exception as error:  # typer brings its own copy of click's errors
            kind, message = type(error).__name__, str(getattr(error, "message", error))
            lacking = kind == "MissingParameter" or message.endswith("requires an argument.")
            shown = kind == "Exit" and {"--help", "-h"} & set(words)
            assert shown or (lacking and line not in in_blocks), (
                f"{line!r}: {message}"
            )  # a sentence may leave arguments out
            continue
        check_settings(list(context.params.get("assignments") or []))


def test_a_wrong_line_would_be_found() -> None:
    assert arguments_of("heretic runs/x --trial 3") == ["run", "runs/x", "--trial", "3"]
    with pytest.raises(Exception) as refused:
        commands()["run"].make_context("run", ["x", "--trial", "3"])
    assert isinstance(refused.value, UsageError) or "NoSuchOption" in type(refused.value).__name__
    with pytest.raises(SettingsError):
        check_settings(["batch=4"])


@every_page
def test_make_and_scripts_take_theirs(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    common = (ROOT / "benchmarks/common.py").read_text(encoding="utf-8")
    for line in [*lines_of_code(page), *quoted(page)]:
        if made := re.match(r"make ([a-z-]+)$", line):
            assert made[1] in targets, line
        if run := re.match(r"(?:\S+/)?python ((?:benchmarks|scripts)/\w+\.py)(?: ([^>]*))?", line):
            script = ROOT / run[1]
            assert script.is_file(), line
            takes = script.read_text(encoding="utf-8") + common
            for option in re.findall(r"(?<!\S)--[\w-]+", run[2] or ""):
                assert f'"{option}"' in takes, f"{line!r}: no option {option}"
            words = shlex.split(line)
            check_settings([words[i + 1] for i, word in enumerate(words) if word == "--set"])


@every_page
def test_extras_that_are_installed_exist(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name in re.findall(r"heretic\[(\w+)\]", page.read_text(encoding="utf-8")):
        assert name in extras, f"there is no extra {name}"


@every_page_of_today
def test_blocks_of_settings_are_settings(page: Path, tmp_path: Path) -> None:
    for language, block in blocks(page.read_text(encoding="utf-8")):
        if language == "toml":
            file = tmp_path / "block.toml"
            file.write_text(block, encoding="utf-8")
            resolve(file, environment={})
