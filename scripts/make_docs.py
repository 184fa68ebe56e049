"""Makes the documents that are made from the code: docs/settings.md and docs/migrating.md. A test compares them.

python scripts/make_docs.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from heretic.settings import Settings, Table
from heretic.settings.field import noted
from heretic.settings.layers import describe_type
from heretic.settings.migrate import DEFAULTS, PROMPT_KEYS, PROMPT_SETS, TABLE
from heretic.settings.text import toml_value

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Write them."""
    for name, text in documents().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def documents() -> dict[str, str]:
    """File names and contents."""
    return {"settings.md": settings_page(), "migrating.md": migrating_page()}


def settings_page() -> str:
    """Every key by table: what it takes, its default, what it is for, and whether a stored study minds."""
    lines = [
        "# Settings",
        "",
        "Made from the schema by `python scripts/make_docs.py`. The same as a file to start from: `heretic config --defaults`.",
        "",
        "A setting marked *free* may change between the sessions of one run. Any other one belongs to the run's fingerprint:",
        "another value begins another run.",
    ]
    for prefix, table, description in tables(Settings(), "", "Settings of a run."):
        lines += ["", f"## `[{prefix}]`" if prefix else "## Without a table", "", description, ""]
        for name, field in type(table).model_fields.items():
            if isinstance(getattr(table, name), Table):
                continue
            default = toml_value(getattr(table, name))
            shown = default if len(default) < 90 else "a list; see `heretic config --defaults`"
            free = " *Free.*" if noted(field, "neutral") else ""
            takes = describe_type(field.annotation)
            lines.append(f"- **`{name}`**: {field.description} Takes {takes}; default `{shown}`.{free}")
            lines.append(f"  When to change it: {noted(field, 'when')}")
    return "\n".join(lines) + "\n"


def tables(table: Table, prefix: str, description: str) -> Iterator[tuple[str, Table, str]]:
    """Every table of the defaults with its dotted name, itself first."""
    yield prefix, table, description
    for name, field in type(table).model_fields.items():
        if isinstance(inner := getattr(table, name), Table):
            yield from tables(inner, f"{prefix}.{name}".lstrip("."), field.description or "")


def migrating_page() -> str:
    """Their settings and ours, side by side."""
    lines = [
        "# Coming from heretic-llm",
        "",
        "`heretic config --from-heretic FILE` writes a `config.toml` of heretic-llm as one of ours, with a comment for what has no",
        "place here. The names are those of heretic-llm 1.4.0 (PyPI). Made by `python scripts/make_docs.py`.",
        "",
        "1. Use an environment of its own: the two tools share the command's name.",
        "2. Rename the old file, `mv config.toml old.toml`: a `config.toml` in the current folder is read by itself, and a shell",
        "   empties the file that it writes to before anything is read from it.",
        "3. `heretic config --from-heretic old.toml > config.toml`",
        "4. `heretic preflight`, then `heretic`.",
        "",
        "| heretic-llm | here | to know |",
        "|---|---|---|",
    ]
    for name, known in TABLE.items():
        lines.append(f"| `{name}` | {f'`{known.ours}`' if known.ours else '-'} | {known.note} |")
    for name, role in PROMPT_SETS.items():
        keys = ", ".join(f"`{a}` = `{b}`" if a != b else f"`{a}`" for a, b in PROMPT_KEYS.items())
        lines.append(f"| `[{name}]` | `[prompts.{role}]` | {keys} |")
    lines += [
        "",
        "What heretic-llm does without being told, and this tool only if told: "
        + "; ".join(f"`{key} = {toml_value(value)}`" for key, value in DEFAULTS.items())
        + ". The converted file says it, since the scores depend on it.",
        "",
        "Studies cannot be carried over: directions, scores and search spaces are not the same. A model that heretic-llm wrote can",
        "be measured here with `heretic evaluate FOLDER --against ORIGINAL`.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
