"""What the documents name exists: files, links, anchors, commands, options and settings."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from heretic.cli import shorthand
from heretic.commands.app import app
from heretic.settings.layers import all_keys

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
HISTORY = ("CHANGELOG.md",)  # tells of what was, too
ids = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    found = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#+ (.+)", line):
            text = re.sub(r"[^\w\- ]", "", match[1].lower().replace("`", ""))
            found.add(text.strip().replace(" ", "-"))
    return found


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks; indented ones have no language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    without = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:^    \S.*\n?)+", without, re.M)
    return [*fenced, *(("", "\n".join(line[4:] for line in block.splitlines())) for block in indented)]


@pytest.mark.parametrize("page", PAGES, ids=ids)
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


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    roots = (ROOT, ROOT / "src/heretic", page.parent, ROOT / "benchmarks", ROOT / "tests")
    for name in re.findall(r"`([\w./-]+/[\w./-]+\.(?:py|md|toml|json))`", page.read_text(encoding="utf-8")):
        assert any((root / name).exists() for root in roots), f"{name} does not exist"


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {name: command for name, command in group.commands.items()}


def options(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help",
        "-h",
    }


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_and_options_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = [line.strip() for _, block in blocks(text) for line in block.splitlines()]
    lines += re.findall(r"`(heretic [^`\n]+)`", text)
    known = commands()
    for line in lines:
        found = re.match(r"(?:\$ )?(?:\S*/)?heretic(?: ([^#|>&;]*))?", line)
        if not found or not re.match(r"(?:\$ )?(?:\.venv/bin/)?heretic( |$)", line):
            continue
        try:
            words = shlex.split(
                (found[1] or "").replace("…", " ").replace("...", " ").replace("[", " ").replace("]", " ")
            )
        except ValueError:
            continue
        if words[:1] in (["--version"], ["-V"], ["--install-completion"], ["--show-completion"], ["--help"]):
            continue
        words = shorthand(words, list(known))
        if not words or words[0].startswith("-") or words[0] == "COMMAND":
            continue
        assert words[0] in known, f"{line!r}: there is no command {words[0]}"
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in options(known[words[0]]), f"{line!r}: no option {word}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=lambda p: p.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    known = set(all_keys())
    tables = {key.rpartition(".")[0] for key in known} | {"prompts"}
    text = page.read_text(encoding="utf-8")
    for language, block in blocks(text):
        if language != "toml":
            continue
        flat: list[str] = []

        def walk(values: dict[str, Any], prefix: str, flat: list[str] = flat) -> None:
            for name, value in values.items():
                if isinstance(value, dict) and prefix + name in tables:
                    walk(value, f"{prefix}{name}.")
                else:
                    flat.append(prefix + name)

        walk(tomllib.loads(block), "")
        assert set(flat) <= known, f"no such settings: {set(flat) - known}"
    if page.name == "migrating.md":  # names those of another tool
        return
    for name in re.findall(r"`((?:search|directions|ablation|prompts)\.[\w.]+)`", text):
        stem = name.rstrip(".")
        if stem.endswith((".py", ".safetensors", ".toml", ".json")):
            continue
        assert any(k == stem or k.startswith(stem + ".") for k in known), f"no setting {name}"
    for name in re.findall(r"--set ([a-z_.]+)=", text):
        assert name in known, f"no setting {name}"


def test_results_that_are_named_are_there() -> None:
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`results/([\w.]+\.json)`", text))
    there = {p.name for p in (ROOT / "benchmarks/results").glob("*.json")}
    assert named == there
    for name in there:
        report = json.loads((ROOT / "benchmarks/results" / name).read_text())
        if name != "families.json":  # a table of families
            assert {"date", "versions"} <= set(report), name


def test_the_map_names_every_module() -> None:
    """CLAUDE.md says of every file of the package what it is."""
    text = (ROOT / "CLAUDE.md").read_text(encoding="utf-8")
    package = ROOT / "src/heretic"
    missing = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        folder = name.partition("/")[0] + "/"
        if path.name in ("__init__.py", "__main__.py") or folder in ("commands/", "settings/", "demo/"):
            continue  # named as a whole
        if f"`{name}`" not in text:
            missing.append(name)
    assert not missing, f"CLAUDE.md does not name: {', '.join(missing)}"
