"""Makes the documents that are made from the code: docs/settings.md, docs/migrating.md, docs/errors.md. A test compares them.

python scripts/make_docs.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic.errors import UserError
from heretic.settings import Settings, SettingsModel
from heretic.settings.field import field_metadata
from heretic.settings.migrate import DEFAULTS, PROMPT_KEYS, PROMPT_SETS, TABLE
from heretic.settings.sources import describe_type
from heretic.settings.toml import toml_value

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = Path(__file__).parents[1] / "src" / "heretic"


def main() -> None:
    """Write them."""
    for name, text in documents().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def documents() -> dict[str, str]:
    """File names and contents."""
    return {"settings.md": settings_page(), "migrating.md": migrating_page(), "errors.md": errors_page()}


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
            if isinstance(getattr(table, name), SettingsModel):
                continue
            default = toml_value(getattr(table, name))
            shown = default if len(default) < 90 else "a list; see `heretic config --defaults`"
            free = " *Free.*" if field_metadata(field, "neutral") else ""
            takes = describe_type(field.annotation)
            lines.append(f"- **`{name}`**: {field.description} Takes {takes}; default `{shown}`.{free}")
            lines.append(f"  When to change it: {field_metadata(field, 'when')}")
    return "\n".join(lines) + "\n"


def tables(table: SettingsModel, prefix: str, description: str) -> Iterator[tuple[str, SettingsModel, str]]:
    """Every table of the defaults with its dotted name, itself first."""
    yield prefix, table, description
    for name, field in type(table).model_fields.items():
        if isinstance(inner := getattr(table, name), SettingsModel):
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


@dataclass(frozen=True)
class Site:
    """A place in the code that makes a UserError; texts have … for what is known only at run time."""

    file: str  # relative to src/heretic
    line: int
    codes: tuple[str, ...]  # one, except where the code depends on the case
    messages: tuple[str, ...]
    fixes: tuple[str, ...]
    exit_status: int


def errors_page() -> str:
    """Return the table of error codes: exit status, messages and fixes. Codes that one place in the code raises share a row."""
    lines = [
        "# Errors",
        "",
        "Every error that you can fix has a stable code, which heretic prints in brackets after the message. Scripts compare the",
        "code (`error.code` of `heretic.errors.UserError` in Python), since texts change. An error without a code is a defect:",
        "please report it. The exit status is 1 unless a number follows the code.",
        "",
        "This table shortens the texts: it leaves out causes, explanations and the name that a message begins with. `…` stands",
        'for a name, a number or a list, `↻` for "then run the same command again; nothing finished is lost". Made from the code',
        "by `python scripts/make_docs.py`.",
        "",
        "|code|message|fix|",
        "|---|---|---|",
    ]
    for codes, own in _rows():
        statuses = sorted({site.exit_status for site in own} - {UserError.exit_status})
        code_cell = "<br>".join(f"`{code}`" for code in codes) + "".join(f" {status}" for status in statuses)
        messages = dict.fromkeys(_short_message(text) for site in own for text in site.messages)
        fixes = dict.fromkeys(_short_fix(text) for site in own for text in site.fixes)
        lines.append(f"|{code_cell}|{_cell(messages) or 'the cause'}|{_cell(fixes)}|")
    return "\n".join(lines) + "\n"


def _rows() -> list[tuple[list[str], list[Site]]]:
    """Return the codes of each row and the places that raise them."""
    rows: list[tuple[set[str], list[Site]]] = []
    for site in sites():
        codes, own = set(site.codes) - {UserError.code}, [site]
        apart = []
        for row in rows:
            if codes & row[0]:
                codes, own = codes | row[0], row[1] + own
            else:
                apart.append(row)
        rows = [*apart, (codes, own)] if codes else rows
    return sorted((sorted(codes), own) for codes, own in rows)


def _short_message(message: str) -> str:
    """Return the first clause of a message, unless that says too little."""
    clause = re.split(r"[:;] |, (?:so|which heretic) |(?<=[\w)'…])\. (?=[A-Z…])", message)[0]
    told = len(re.findall(r"\w+", clause)) > 1
    return re.sub(r"^(… )+| \(…\)|(?<=…) …$", "", clause if told else message).rstrip(".:")


def _short_fix(fix: str) -> str:
    """Return a fix without explanations in parentheses or after a semicolon."""
    fix = re.sub(r"(?:,? then| and) run the same command again\b(?:; nothing finished is lost)?", " ↻", fix)
    fix = re.sub(r"; (?:heretic|its?|the (?:card|study))\b[^;]*| \((?:[^\s();]+ ){3,}[^();]*\)", "", fix)
    return fix.replace(" = ", "=")


def _cell(texts: Iterable[str]) -> str:
    """Return texts as one cell of a table, without those that another one contains."""
    known = list(texts)
    told = [text for text in known if not any(text != longer and text.rstrip("↻ ") in longer for longer in known)]
    return "<br>".join(_escaped(text).replace("|", "\\|") for text in told)


def sites() -> list[Site]:
    """Every place in src/heretic that makes a UserError, by file and line."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    kinds = {"UserError": (UserError.code, UserError.exit_status)}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in sorted(classes, key=lambda node: node.lineno):
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in kinds:
                own: dict[str, Any] = {
                    target.id: statement.value.value
                    for statement in node.body
                    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
                    for target in statement.targets
                    if isinstance(target, ast.Name)
                }
                code, status = kinds[base.id]
                kinds[node.name] = (own.get("code", code), own.get("exit_status", status))
    found = []
    for path, tree in trees.items():
        for scope in ast.walk(tree):
            if not isinstance(scope, ast.FunctionDef):
                continue
            for call in ast.walk(scope):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                    continue
                given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
                # `error` is a parameter that holds the kind, as in heretic.files.open_regular.
                name = "UserError" if call.func.id == "error" and "code" in given else call.func.id
                if name not in kinds or not call.args:
                    continue
                code, status = kinds[name]
                codes = [code]
                if "code" in given:
                    codes = [text for text in _texts(given["code"], scope) if text != "…"]
                    codes += _passed(given["code"], scope, trees.values())
                messages = _known(_texts(call.args[0], scope))
                fixes = _known(_texts(given["fix"], scope)) if "fix" in given else ()
                file = path.relative_to(SOURCE).as_posix()
                found.append(Site(file, call.lineno, tuple(codes), messages, fixes, status))
    return list({(site.file, site.line): site for site in found}.values())  # once for a function in a function


def _known(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for text in texts if text.strip("… .,;:"))


def _texts(node: ast.expr, scope: ast.FunctionDef, depth: int = 0) -> list[str]:
    """The texts that an expression can be; a name is looked up in the assignments of its function."""
    if isinstance(node, ast.Constant):
        return [] if node.value is None else [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
        return ["".join(parts)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, scope, depth) + _texts(node.orelse, scope, depth)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in _texts(value, scope, depth)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = (_texts(side, scope, depth) or ["…"] for side in (node.left, node.right))
        return [one + other for one in left for other in right]
    if isinstance(node, ast.Name) and depth < 3:
        texts = [text for value in _assigned(node.id, scope) for text in _texts(value, scope, depth + 1)]
        return texts or ["…"]
    return ["…"]


def _assigned(name: str, scope: ast.FunctionDef) -> Iterator[ast.expr]:
    """What a function assigns to a name, also as one of several."""
    for statement in ast.walk(scope):
        if not isinstance(statement, ast.Assign):
            continue
        for target in statement.targets:
            if isinstance(target, ast.Name) and target.id == name:
                yield statement.value
            elif isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                for one, value in zip(target.elts, statement.value.elts, strict=True):
                    if isinstance(one, ast.Name) and one.id == name:
                        yield value


def _passed(code: ast.expr, scope: ast.FunctionDef, trees: Iterable[ast.Module]) -> list[str]:
    """The codes that callers of a function pass as the parameter that it takes the code from."""
    names = [argument.arg for argument in scope.args.args]
    if not isinstance(code, ast.Name) or code.id not in [*names, *(a.arg for a in scope.args.kwonlyargs)]:
        return []
    place = names.index(code.id) if code.id in names else len(names)
    found = []
    for call in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id == scope.name:
            given = [k.value for k in call.keywords if k.arg == code.id] + call.args[place : place + 1]
            found += [str(value.value) for value in given if isinstance(value, ast.Constant)]
    return sorted(set(found))


def _escaped(text: str) -> str:
    """As Markdown text on one line."""
    return re.sub(r"([\\*<])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    main()
