"""Rows of prompt files, and the prompt that a row holds: a text, or a conversation."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from heretic.errors import UserError, first_line
from heretic.files import open_regular, read_text, split_lines

Row = tuple[
    int, Mapping[str, Any]
]  # the line (.jsonl, .csv) or number (.json, .parquet) of a row, from 1, and its columns
WHAT = "The prompt file"
LONGEST_FIELD = 1 << 24  # characters; csv's own limit is 128 Ki
# How conversations name the speaker and the text: OpenAI's messages, and ShareGPT's.
SPEAKER, TEXT = ("role", "from"), ("content", "value")
USER = {"user", "human"}


def rows_of(path: Path, key: str) -> list[Row]:
    """The rows of a .jsonl, .json, .csv or .parquet file.

    Args:
        path: the file; its suffix says which format it has.
        key: the setting that names it, for messages.

    Raises:
        UserError: `bad-data-file` with file, line and cause, or what `read_text` raises.
    """
    reader = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}[path.suffix]
    return list(reader(path, f"{key}.source"))


def prompt_in(value: Any, place: str, key: str) -> str | None:
    """The prompt in a cell: a text as it is, the last user turn of a conversation, None for an empty cell.

    A conversation is a list of messages, each with `role` and `content` or with `from` and `value`; a content may be a list of
    parts of type "text". Anything else is refused: its spelling in Python is no prompt.

    Raises:
        UserError: `not-a-prompt`, naming the `place`.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        names, columns = list(value), list(value.values())  # a list of messages, as data sets store it by columns
        value = [dict(zip(names, parts, strict=False)) for parts in zip(*columns, strict=False)]
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        return _last_user_turn(value, place, key)
    raise _no_prompt(f"holds {_kind(value)}, not a text", place, key)


def _last_user_turn(messages: Sequence[Mapping[str, Any]], place: str, key: str) -> str | None:
    for message in reversed(messages):
        speaker = next((message[name] for name in SPEAKER if name in message), None)
        content = next((message[name] for name in TEXT if name in message), None)
        if speaker is None or content is None:
            raise _no_prompt("holds a list that is no conversation: a message has no role or no content", place, key)
        if str(speaker).lower() not in USER:
            continue
        if isinstance(content, str):
            return content.strip() or None
        parts = content if isinstance(content, list) else [content]
        if not all(
            isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
        ):
            raise _no_prompt("holds a message that is not text only", place, key)
        return "\n".join(p["text"] for p in parts).strip() or None
    raise _no_prompt("holds a conversation without a user turn", place, key)


def _no_prompt(what: str, place: str, key: str) -> UserError:
    return UserError(
        f"{place} {what}.",
        code="not-a-prompt",
        where=f"{key}.column",
        fix="name a column of texts or of conversations (lists of messages with role and content)",
    )


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        bytes: "bytes",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def bad_file(path: Path, cause: str, where: str, *, line: int | None = None) -> UserError:
    """A data file that cannot be parsed."""
    place = f"{path}:{line}" if line else str(path)
    return UserError(
        f"{place}: {cause}", code="bad-data-file", where=where, fix="correct the file, or name another one"
    )


def _json_lines(path: Path, where: str) -> Iterator[Row]:
    for number, line in enumerate(split_lines(read_text(path, WHAT, where=where)), start=1):
        if line.strip():
            yield number, _object(_parsed(line, path, where, number), path, where, number)


def _json(path: Path, where: str) -> Iterator[Row]:
    text = read_text(path, WHAT, where=where)
    try:
        content = json.loads(text)
    except ValueError:  # several values, one a line, are common under this name too
        try:
            yield from list(_json_lines(path, where))
            return
        except UserError:
            pass
        content = _parsed(text, path, where)
    except RecursionError:
        content = _parsed(text, path, where)
    if isinstance(content, dict) and content and all(isinstance(part, list) for part in content.values()):
        columns = list(content.values())
        if len({len(column) for column in columns}) != 1:
            raise bad_file(path, "the columns have different lengths.", where)
        content = [dict(zip(content, parts, strict=True)) for parts in zip(*columns, strict=True)]
    if not isinstance(content, list):
        raise bad_file(path, "the file holds no list of rows.", where)
    for number, row in enumerate(content, start=1):
        yield number, _object(row, path, where, None, f"row {number} ")


def _parsed(text: str, path: Path, where: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise bad_file(path, "this is nested too deeply.", where, line=line) from None
    except json.JSONDecodeError as error:
        at = line or error.lineno
        raise bad_file(path, f"this is not valid JSON: {error.msg} (column {error.colno}).", where, line=at) from None
    except ValueError as error:  # a number of thousands of digits
        raise bad_file(path, f"{first_line(error)}.", where, line=line) from None


def _object(row: Any, path: Path, where: str, line: int | None, what: str = "") -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise bad_file(path, f'{what}is {_kind(row)}, not an object such as {{"text": "..."}}.', where, line=line)
    return row


def _csv(path: Path, where: str) -> Iterator[Row]:
    text = read_text(path, WHAT, where=where)
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if names is None:
                names = fields
                if len(set(names)) < len(names):
                    raise bad_file(path, "two columns have the same name.", where, line=1)
            elif fields:
                if len(fields) != len(names):
                    raise bad_file(
                        path,
                        f"{len(fields)} fields where the first line has {len(names)}; a text with a comma needs quotes.",
                        where,
                        line=line,
                    )
                yield line, dict(zip(names, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise bad_file(path, f"this is not valid CSV: {error}.", where, line=line) from None


def _parquet(path: Path, where: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with open_regular(path, WHAT, where=where) as file:
        data = file.read()
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        if len(set(table.column_names)) < len(table.column_names):
            raise bad_file(path, "two columns have the same name.", where)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise bad_file(path, f"this is not a whole Parquet file: {first_line(error)[:200]}.", where) from None
    yield from enumerate(rows, start=1)
