"""Merge settings from the defaults, the TOML file, the environment and the command line, in this order.

`resolve` returns the settings with the origin of every value, so that messages can name the file, line and key.
An unknown key in any source is an error.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from heretic.errors import LONGEST_SHOWN, SettingsError, is_unicode, plain_line, shortened
from heretic.files import read_text, split_lines
from heretic.settings import Settings, SettingsModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "HERETIC_"
DEFAULT_FILE = "config.toml"
LARGEST_FILE = 1 << 20  # bytes
LONGEST_NUMBER = 4000  # digits; Python's own limit is 4300
MOST_PARTS = 64  # of a dotted key; the schema has 4
# A dotted key. The pattern is unambiguous and also matches an open quote, so matching takes linear time.
_QUOTED = re.compile(r""""(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?""")
_DOTTED = re.compile(rf"(?:[\w-]+|{_QUOTED.pattern})(?:[ \t]*\.[ \t]*(?:[\w-]+|{_QUOTED.pattern}))*")
NEVER_SHOWN = ("judge.llm.key_variable", "judge.llm.base_url")  # a user may have put a key there by mistake


@dataclasses.dataclass(frozen=True)
class TomlFile:
    """A parsed TOML file: its values as plain data, and the line number of every dotted key."""

    path: Path
    text: str
    values: dict[str, Any]
    lines: dict[str, int]

    def written_origins(self) -> dict[str, str]:
        """Return the origins that heretic wrote as comments behind the values of a run's config.toml."""
        lines = split_lines(self.text)
        return {
            key: lines[number - 1].rpartition("  # ")[2]
            for key, number in self.lines.items()
            if "  # " in lines[number - 1]
        }


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Settings, their file (if any), and the origin of every dotted key that has been set."""

    settings: Settings
    file: Path | None
    origins: dict[str, str]
    # Of a run: its relative paths, by the absolute ones used instead.
    shortened: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Return the origin of `key`: 'config.toml:12', 'HERETIC_SEED', '--set seed' or 'default'."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return "default"


def resolve(
    config: Path | TomlFile | None = None,
    options: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """Merge the sources of settings.

    A prompt set whose `source` is set outside the file does not use the file's `split`, which belongs to another data set.

    Args:
        config: the settings file, read or not; default: `config.toml` in the current folder, if it exists.
        options: values by dotted key or in tables.
        assignments: the `key=value` texts of --set.
        environment: environment variables.

    Raises:
        SettingsError: names the source, the key and, for a file, the line.
    """
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    # 1. The file
    if config is None and os.path.lexists(DEFAULT_FILE):
        config = Path(DEFAULT_FILE)
    file = read_toml(config) if isinstance(config, Path) else config
    file_values: dict[str, Any] = {}
    if file is not None:
        file_values = dict(_flatten(file.values, Settings))
        for key, value in file_values.items():
            _set(data, origins, key, value, f"{file.path}:{file.lines[key]}" if key in file.lines else str(file.path))
    file_origins = dict(origins)
    # 2. The environment
    for variable, text in (environment or {}).items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable[len(ENVIRONMENT_PREFIX) :].lower().replace("__", ".")
            if not text and _annotation(key) is not None and not _allows(key, ""):
                continue  # as files of container services write a variable that is not set
            _set(data, origins, key, _parse(key, text, variable), variable)
    # 3. The command line
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise SettingsError(
                f"--set {shortened(assignment)}: the '=' is missing.", where="--set", fix="write --set key=value"
            )
        _set(data, origins, key, _parse(key, text.strip(), f"--set {key}"), f"--set {key}")
    for key, value in _flatten(options or {}, Settings):
        if value is not None:
            _set(data, origins, key, value, "option")
    _drop_splits_of_replaced_sources(data, origins, file_values, file_origins)
    return Resolved(_validated(data, origins), file.path if file else None, origins)


def _drop_splits_of_replaced_sources(
    data: dict[str, Any], origins: dict[str, str], file_values: Mapping[str, Any], file_origins: Mapping[str, str]
) -> None:
    for source in [key for key in origins if key.startswith("prompts.") and key.endswith(".source")]:
        split = source.removesuffix("source") + "split"
        split_from_file = split in file_origins and origins[split] == file_origins[split]
        if split_from_file and origins[source] != file_origins.get(source):
            sets = data["prompts"]
            table = sets.get(source.split(".")[1]) if isinstance(sets, dict) else None
            kept_sources = (None, "", file_values.get(source))
            if isinstance(table, dict) and "split" in table and table.get("source") not in kept_sources:
                del table["split"], origins[split]


def check_types(values: Mapping[str, Any], origin: str) -> None:
    """Raise SettingsError for unknown keys and invalid values, by dotted key, without reading a file."""
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in values.items():
        _set(data, origins, key, value, origin)
    _validated(data, origins)


def _validated(data: dict[str, Any], origins: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise _explain(error, origins) from None


def read_toml(path: Path) -> TomlFile:
    """Read a TOML file.

    Raises:
        SettingsError: as `files.read_text` and `_check_value`, or with code invalid-toml.
    """
    text = read_text(path, "The settings file", error=SettingsError, largest=LARGEST_FILE)
    try:
        values, lines = _parse_toml(text), line_numbers(text)
    except RecursionError:
        raise SettingsError(
            "The values are nested too deeply.", code="invalid-toml", where=str(path), fix="remove the inner brackets"
        ) from None
    except ValueError as error:  # also integers of more digits than Python reads
        position = re.search(r"at line (\d+)", str(error))
        line = int(position[1]) if position else None
        if digits := None if position else re.search(rf"\d[\d_]{{{LONGEST_NUMBER},}}", text):
            line = text.count("\n", 0, digits.start()) + 1
        where = f"{path}:{line}" if line else str(path)
        problem = plain_line(str(error)[:200].rstrip("."))
        raise SettingsError(f"This is not valid TOML: {problem}.", code="invalid-toml", where=where) from None
    for key, value in _flatten(values, Settings):
        _check_value(key, value, f"{path}:{lines[key]}" if key in lines else str(path))
    return TomlFile(path, text, values, lines)


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; refuse keys of very many parts first, because the parser takes quadratic time for them."""
    for key in _DOTTED.finditer(text):
        if key[0].count(".") >= MOST_PARTS and _QUOTED.sub("", key[0]).count(".") >= MOST_PARTS:
            line = text.count("\n", 0, key.start()) + 1
            raise ValueError(f"A key has more than {MOST_PARTS} parts (at line {line})")
    return tomllib.loads(text)


def _check_value(key: str, value: Any, origin: str) -> None:
    """Refuse strings that are not UTF-8 or contain NUL, and integers outside TOML's range."""
    problem = ""
    if isinstance(value, str):
        if not is_unicode(value):  # for example bytes of a file name
            problem = "is not valid UTF-8"
        elif "\0" in value:
            problem = "contains a NUL character"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        problem = "is an integer with more than 64 bits"
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_value(key, item, origin)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_value(key, str(name), origin)
            _check_value(key, item, origin)
    if problem:
        raise SettingsError(f"The setting '{shortened(key)}' {problem}.", where=origin, fix=_expected(key))


_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_HEADER = re.compile(r"^\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")


def line_numbers(text: str) -> dict[str, int]:
    """Return the line numbers (from 1) of the keys and tables of a valid TOML text, which the parser does not record."""
    numbers: dict[str, int] = {}
    table = ""
    closing = ""  # the delimiter that ends the current multi-line string
    for number, line in enumerate(split_lines(text), start=1):
        if closing:
            closing = "" if closing in line else closing
            continue
        for delimiter in ('"""', "'''"):
            if line.count(delimiter) == 1:
                closing = delimiter
        if header := _HEADER.match(line):
            table = _dotted(header.group(1))
            numbers.setdefault(table, number)
        elif key := _KEY.match(line):
            numbers.setdefault(f"{table}.{_dotted(key.group(1))}" if table else _dotted(key.group(1)), number)
    return numbers


def _dotted(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def field_of(key: str, origin: str) -> tuple[type[SettingsModel], str]:
    """Return the table and field of a dotted key, or of the map with that entry. Raises SettingsError, naming the nearest key."""
    *parents, (name, last) = _walk(key)
    if last is not None:
        table: type[SettingsModel] = Settings
        for part, annotation in parents:
            if not (isinstance(annotation, type) and issubclass(annotation, SettingsModel)):
                return table, part
            table = annotation
        return table, name
    near = difflib.get_close_matches(key, list(all_keys()), n=1, cutoff=0.5)
    if not near:  # the right name in the wrong table
        near = [known for known in all_keys() if known.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    raise SettingsError(
        f"Unknown setting '{shortened(key)}'.",
        code="unknown-setting",
        where=origin if len(origin) <= 2 * LONGEST_SHOWN else shortened(origin),
        fix=f"did you mean '{near[0]}'?" if near else "list all settings: heretic config --defaults",
    )


def _walk(key: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a dotted key with their types, None for an unknown one, which is the last.

    The name of a map's entry is one part, so `constraints.kl.p95` has two.
    """
    annotation: Any = Settings
    parts = key.split(".")
    while parts:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            part, parts = (parts[0], parts[1:]) if get_origin(annotation) is dict else (".".join(parts), [])
        else:
            part, parts = parts[0], parts[1:]
            is_table = isinstance(annotation, type) and issubclass(annotation, SettingsModel)
            field = annotation.model_fields.get(part) if is_table else None
            annotation = field.annotation if field else None
        yield part, annotation
        if annotation is None:
            return


def _annotation(key: str) -> Any:
    """Return the type of a dotted key, which can name an entry of a map; None for an unknown key."""
    return [annotation for _, annotation in _walk(key)][-1]


def all_keys(table: type[SettingsModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema that is not a table."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, SettingsModel):
            yield from all_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _flatten(
    values: Mapping[str, Any], table: type[SettingsModel] | None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; enter only the schema's tables, so that maps stay values."""
    for name, value in values.items():
        field = table.model_fields.get(name) if table else None
        annotation = field.annotation if field else None
        if isinstance(value, dict) and isinstance(annotation, type) and issubclass(annotation, SettingsModel):
            yield from _flatten(value, annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _set(data: dict[str, Any], origins: dict[str, str], key: str, value: Any, origin: str) -> None:
    field_of(key, origin)
    _check_value(key, value, origin)
    origins[key] = origin
    (*parents, (name, _)), path = _walk(key), ""
    for parent, annotation in parents:
        data, path = data.setdefault(parent, {}), f"{path}.{parent}".lstrip(".")
        if not isinstance(data, dict):
            return  # validation reports the value that should be a table
        if get_origin(annotation) is dict:
            origins[path] = origin  # a map is one value in a run's config.toml
    data[name] = copy.deepcopy(value)  # a later source may add entries to a map


def _parse(key: str, text: str, origin: str) -> Any:
    """Parse a value of the environment or --set: as TOML if the field allows the result, else as a string."""
    if _annotation(key) is None:
        return text  # _set reports the unknown key
    candidates: list[Any] = [text]
    with contextlib.suppress(ValueError, RecursionError):
        parsed = _parse_toml(f"value = {text}")
        if parsed.keys() == {"value"}:  # more lines would be more settings
            candidates.insert(0, parsed["value"])
    for candidate in candidates:
        _check_value(key, candidate, origin)
        if _allows(key, candidate):
            return candidate
    return candidates[0]  # validation of all settings reports the problem


def _allows(key: str, value: Any) -> bool:
    """Return whether a value has the type of this setting."""
    try:
        TypeAdapter(_annotation(key)).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _explain(error: ValidationError, origins: Mapping[str, str]) -> SettingsError:
    """Return pydantic's first error with the origin of the value."""
    problem = error.errors()[0]
    known = set(all_keys())
    path = [str(part) for part in problem["loc"]]
    key = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known), ".".join(path))
    related = (key, *(k for k in origins if key.startswith(k) or k.startswith(key + ".")))
    where = next((origins[k] for k in related if k in origins), "")
    value = problem["input"]
    shown = f"{value!r}" if isinstance(value, (str, int, float, bool, list)) else type(value).__name__
    shown = "this value" if key in NEVER_SHOWN else shortened(shown)
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    fix = None if _annotation(key) is str and isinstance(value, str) else _expected(key)  # the message says it
    return SettingsError(f"The setting '{key}' cannot be {shown}: {message}.", where=where or None, fix=fix)


def _expected(key: str) -> str | None:
    annotation = _annotation(key)
    return None if annotation is None else f"set '{key}' to {describe_type(annotation)}"


def describe_type(annotation: Any) -> str:
    """Describe a field's type for messages and documentation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(a) for a in arguments)
    if str(origin) == "typing.Literal":
        return "one of " + ", ".join(f'"{a}"' for a in arguments)
    if origin is list:
        return f"a list; each item {describe_type(arguments[0])}"
    if origin is dict:
        return f"a table; each value {describe_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, SettingsModel):
        return "a table"
    if hasattr(annotation, "__metadata__"):
        return describe_type(arguments[0])
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(
        annotation, str(annotation)
    )
