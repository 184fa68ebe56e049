"""Read the rows of prompt files and extract the prompt from a text or a conversation."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from heretic.errors import UserError, first_line, is_unicode
from heretic.files import open_regular, read_text, split_lines

# The line (.jsonl, .csv) or number (.json, .parquet) of a row, from 1, and its columns.
Row = tuple[int, Mapping[str, Any]]
_Table = tuple[list[str], list[tuple[int, list[str]]]]  # names of the columns, line and fields of every row
WHAT = "The prompt file"
SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}  # Excel writes semicolons where the comma is decimal
# In a .tsv: a quote that neither begins nor ends a field, and one within a quoted field.
STRAY_QUOTE = re.compile(r'(?<![\t\n])(?<!^)"(?![\t\n])(?!$)')
DOUBLED_QUOTE = re.compile(r'(?:^|\t)"[^"\n]*""[^\n]*"(?:\t|$)', re.M)
QUOTED_NAME = re.compile(r'(?:^|\t)"[^"\t\n]*"(?:[\t\r\n]|$)')  # in the first line
LONGEST_FIELD = 1 << 24  # characters; csv's own limit is 128 Ki
# Keys of speaker and text: OpenAI's messages, and ShareGPT's.
SPEAKER, TEXT = ("role", "from"), ("content", "value")
USER = {"user", "human", "prompter"}
# A conversation serialized as text, by Python or as JSON, as pandas does in a CSV file.
WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")


def read_rows(path: Path, key: str, columns: Sequence[str]) -> list[Row]:
    """Read the rows of a .jsonl, .json, .csv, .tsv or .parquet file.

    Args:
        path: the file; its suffix is its format.
        key: the setting that names the file, for messages; empty if there is none.
        columns: names of the prompt column, of which the first that exists counts; a Parquet file is read without the others.

    Raises:
        UserError: with code bad-data-file, file, line and cause; or as `read_text`.
    """
    where, kind = f"{key}.source" if key else str(path), path.suffix.lower()
    if kind == ".parquet":
        return list(_parquet(path, where, columns))
    if kind in (".csv", ".tsv"):
        return list(_csv(path, where, columns))
    return list({".jsonl": _json_lines, ".json": _json}[kind](path, where, columns))


def prompt_in(value: Any, place: str, key: str) -> str | None:
    """Return the prompt in a cell: the text, or the last user turn of a conversation; None for an empty cell.

    A conversation is a list of messages, each with `role` and `content` or with `from` and `value`; a content may be a
    list of parts of type "text".

    Args:
        value: the cell.
        place: file, row and column, for messages.
        key: the setting that names the file, for messages; empty if there is none.

    Raises:
        UserError: with code not-a-prompt, for any other value.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if WRITTEN_OUT.match(value):
            raise _no_prompt("is a conversation serialized as text, not a list of messages", place, key)
        return _text(value, place, key)
    messages = _messages(value)
    if messages is None:
        raise _no_prompt(f"is {_kind(value)}, not a text or a conversation", place, key)
    turn = _last_user_turn(messages)
    if turn is None:
        raise _no_prompt("is a conversation without a user turn", place, key)
    content = next((messages[turn][name] for name in TEXT if messages[turn].get(name) is not None), None)
    parts = [_part(part) for part in content] if isinstance(content, (list, tuple)) else [_part(content)]
    if not parts or any(part is None for part in parts):
        raise _no_prompt("is a conversation whose last user turn is not only text", place, key)
    return _text("\n".join(part for part in parts if part is not None), place, key)


def has_other_turns(value: Any) -> bool:
    """Return whether a cell is a conversation with a system message or earlier turns, which the prompt omits."""
    messages = None if isinstance(value, str) else _messages(value)
    return bool(messages and _last_user_turn(messages))


def _messages(value: Any) -> list[Mapping[str, Any]] | None:
    """Return the messages of a conversation; None for any other value."""
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        names, columns = list(value), list(value.values())  # data sets store a list of messages by columns
        value = [dict(zip(names, parts, strict=False)) for parts in zip(*columns, strict=False)]
    if not isinstance(value, (list, tuple)) or not value:
        return None
    return list(value) if all(isinstance(m, Mapping) and _speaker(m) is not None for m in value) else None


def _last_user_turn(messages: Sequence[Mapping[str, Any]]) -> int | None:
    return next((n for n in reversed(range(len(messages))) if _speaker(messages[n]) in USER), None)


def _speaker(message: Mapping[str, Any]) -> str | None:
    speaker = next((message[name] for name in SPEAKER if message.get(name) is not None), None)
    return speaker.strip().lower() if isinstance(speaker, str) else None


def _part(part: Any) -> str | None:
    """Return the text of a message or of a part of it; None for an image or another type."""
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        part = part.get("text")
    return part if isinstance(part, str) else None


def _text(text: str, place: str, key: str) -> str | None:
    if not is_unicode(text):  # JSON can escape surrogates, which UTF-8 and tokenizers cannot encode
        raise _no_prompt("is not valid UTF-8", place, key)
    return text.strip() or None


def _no_prompt(what: str, place: str, key: str) -> UserError:
    return UserError(
        f"{place} {what}.",
        code="not-a-prompt",
        where=f"{key}.column" if key else None,
        fix="choose a column with texts or conversations (lists of messages with role and content)",
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
    """Return the error for a data file that cannot be parsed."""
    place = f"{path}:{line}" if line else str(path)
    return UserError(f"{place}: {cause}", code="bad-data-file", where=where, fix="correct the file or use another one")


def _json_lines(path: Path, where: str, columns: Sequence[str], *, or_list: bool = True) -> Iterator[Row]:
    text = read_text(path, WHAT, where=where)
    if or_list and text.lstrip().startswith("[") and text.rstrip().endswith("]"):  # a JSON list in a .jsonl file
        yield from _json(path, where, columns)
        return
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            yield number, _object(_parsed(line, path, where, number), path, where, number)


def _json(path: Path, where: str, columns: Sequence[str]) -> Iterator[Row]:
    text = read_text(path, WHAT, where=where)
    if not text.strip():
        return
    try:
        content = _parsed(text, path, where)
    except UserError:  # .json files with one value per line are common
        first = next(line.strip() for line in split_lines(text) if line.strip())
        if not first.startswith("{") or first == "{":
            raise
        yield from _json_lines(path, where, columns, or_list=False)
        return
    content = _rows_of_columns(content, path, where, columns)
    if not isinstance(content, list):
        raise bad_file(path, "the file is not a list of rows.", where)
    if all(isinstance(row, str) for row in content):  # a list of prompts
        content = [{columns[0]: row} for row in content]
    for number, row in enumerate(content, start=1):
        yield number, _object(row, path, where, None, f"row {number} ")


def _rows_of_columns(content: Any, path: Path, where: str, usual: Sequence[str]) -> Any:
    """Return the rows of an object of columns; any other content as it is.

    A column is a list, or an object by the row's name, usually its number, as pandas writes it.
    """
    if not isinstance(content, dict) or not content:
        return content
    columns = list(content.values())
    if all(isinstance(column, dict) for column in columns):
        names = list(columns[0])
        if not any(name in content for name in usual) and not all(name.isdigit() for name in names):
            return content
        if any(column.keys() != columns[0].keys() for column in columns):
            raise bad_file(path, "the columns have different rows.", where)
        columns = [[column[name] for name in names] for column in columns]
    elif not all(isinstance(column, list) for column in columns):
        return content
    if len({len(column) for column in columns}) != 1:
        raise bad_file(path, "the columns have different lengths.", where)
    return [dict(zip(content, parts, strict=True)) for parts in zip(*columns, strict=True)]


def _parsed(text: str, path: Path, where: str, line: int | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise bad_file(path, "this is nested too deeply.", where, line=line) from None
    except json.JSONDecodeError as error:
        at = line or error.lineno
        if line and text.rstrip().endswith("},"):
            raise bad_file(path, "the line ends with a comma.", where, line=at) from None
        raise bad_file(path, f"this is not valid JSON: {error.msg} (column {error.colno}).", where, line=at) from None
    except ValueError as error:  # a key twice, a number of thousands of digits
        raise bad_file(path, f"{first_line(error)}.", where, line=line) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key '{next(n for n in names if names.count(n) > 1)[:50]}' twice")
    return items


def _object(row: Any, path: Path, where: str, line: int | None, what: str = "") -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise bad_file(path, f'{what}is {_kind(row)}, not an object such as {{"text": "..."}}.', where, line=line)
    return row


def _csv(path: Path, where: str, columns: Sequence[str]) -> Iterator[Row]:
    text = read_text(path, WHAT, where=where)
    if path.suffix.lower() == ".tsv":
        names, rows = _tab_separated(path, where, text)
    else:
        names, rows = _fields(path, where, text, _separator(text, columns), csv.QUOTE_MINIMAL)
    # CSV has no types: a column of numbers only is not a column of texts.
    numbers = [all(_is_number(fields[n]) for _, fields in rows) for n in range(len(names))]
    for line, fields in rows:
        cells = [float(cell) if number else cell for cell, number in zip(fields, numbers, strict=True)]
        yield line, dict(zip(names, cells, strict=True))


def _tab_separated(path: Path, where: str, text: str) -> _Table:
    """Read a .tsv file, in which quotes quote fields, or nothing, as many programs write them. Raises UserError."""
    plain: Literal[0, 3] = csv.QUOTE_NONE
    quoted: Literal[0, 3] = csv.QUOTE_MINIMAL
    quotes_quote = bool(DOUBLED_QUOTE.search(text) or QUOTED_NAME.search(text.partition("\n")[0]))
    if not quotes_quote and STRAY_QUOTE.search(text.replace('""', "")):
        return _fields(path, where, text, "\t", plain)
    try:
        names, rows = _fields(path, where, text, "\t", quoted)
    except UserError:
        if quotes_quote:
            raise
        return _fields(path, where, text, "\t", plain)
    several = (line for line, fields in rows if any("\n" in field and "\t" in field for field in fields))
    if not quotes_quote and (line := next(several, None)):
        try:
            _fields(path, where, text, "\t", plain)
        except UserError:
            return names, rows
        raise bad_file(
            path,
            "its quotes enclose a field with line breaks, or are part of the text. Quote the names in the first line if they "
            "enclose fields; else double them and enclose the fields.",
            where,
            line=line,
        )
    return names, rows


def _fields(path: Path, where: str, text: str, separator: str, quoting: Literal[0, 3]) -> _Table:
    """Return the names of the columns, and line and fields of every row. Raises UserError."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator, quoting=quoting)
    names: list[str] | None = None
    rows: list[tuple[int, list[str]]] = []
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
                        f"{len(fields)} fields, but the first line has {len(names)}. A text with "
                        f"{SEPARATORS[separator]} needs quotes.",
                        where,
                        line=line,
                    )
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise bad_file(path, f"this is not valid CSV: {error}.", where, line=line) from None
    return names or [], rows


def _separator(text: str, columns: Sequence[str]) -> str:
    """Return the separator of the first line, outside quotes: one that makes one of `columns` a field, the first that any does.

    Else it is the most frequent one.
    """
    head = re.sub(r'"([^"]*)"', lambda found: re.sub("[,;\t]", "", found[1]), text.partition("\n")[0])
    fitting = ([mark for mark in SEPARATORS if column in head.split(mark)] for column in columns)
    return max(next(filter(None, fitting), SEPARATORS), key=head.count)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet(path: Path, where: str, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with open_regular(path, WHAT, where=where) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise bad_file(path, "two columns have the same name.", where)
            column = next((column for column in columns if column in names), None)
            values = table.read(columns=[column]).column(column).to_pylist() if column is not None else [None]
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise bad_file(path, f"this is not a valid Parquet file: {first_line(error)[:200]}.", where) from None
    for number, value in enumerate(values, start=1):
        yield number, {**dict.fromkeys(names), column: value} if column is not None else dict.fromkeys(names)
