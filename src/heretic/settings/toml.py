"""Write settings as TOML: the documented defaults or the resolved settings of a run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from heretic.errors import plain_line
from heretic.settings import Settings, SettingsModel
from heretic.settings.field import when_to_change
from heretic.settings.sources import Resolved, describe_type, field_of


def toml_value(value: Any) -> str:
    """Return a value as TOML. Strings are JSON strings, which are valid TOML, with unprintable characters escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        inside = ", ".join(f"{toml_value(str(k))} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    raise TypeError(f"no TOML for {type(value)}")


def defaults_text() -> str:
    """Return every key with its documentation and default: the content of config.default.toml."""
    head = (
        "# All settings of heretic with their defaults, written by: heretic config --defaults\n"
        "# Copy the settings that you change to config.toml; the others keep their defaults.\n"
        "# The same keys work as an option (--set ablation.geometry=plain) and in the environment\n"
        "# (HERETIC_ABLATION__GEOMETRY=plain). Options override the environment, which overrides the file.\n"
    )
    return head + "\n".join(_document(Settings(), Settings, "", lambda _: None)) + "\n"


def resolved_text(resolved: Resolved) -> str:
    """Return every key with its value and origin; the text reads back as the same settings."""
    return "\n".join(_document(resolved.settings, Settings, "", resolved.origin)).lstrip() + "\n"


def commented_text(values: Mapping[str, Any]) -> str:
    """Return a settings file of these top-level keys, each with its documentation."""
    lines: list[str] = []
    for name, value in values.items():
        lines += ["", *_documentation(Settings.model_fields[name]), *_assignment(name, value)]
    return "\n".join(lines[1:]) + "\n"


def explanation(key: str, resolved: Resolved) -> str:
    """Return what a setting or a table of settings means, its type, default, value and origin, as TOML.

    Raises:
        SettingsError: with code unknown-setting.
    """
    table, name = field_of(key, "--explain")
    value: Any = resolved.settings
    for part in key.split("."):
        if not isinstance(value, SettingsModel):  # an entry of a map: the whole map is explained
            key = key[: key.index(f".{part}")] if f".{part}" in key else key
            break
        value = getattr(value, part)
    if isinstance(value, SettingsModel):
        head = textwrap.wrap(
            table.model_fields[name].description or "", 118, initial_indent="# ", subsequent_indent="# "
        )
        return "\n".join([*head, f"[{key}]", *_document(value, type(value), f"{key}.", lambda _: None)]) + "\n"
    field = table.model_fields[name]
    lines = _documentation(field)
    default = toml_value(field.get_default(call_default_factory=True))
    return "\n".join([*lines, f"# Default: {default}", f"{key} = {toml_value(value)}  # {resolved.origin(key)}"]) + "\n"


def _document(
    values: SettingsModel, table: type[SettingsModel], prefix: str, origin: Callable[[str], str | None]
) -> list[str]:
    lines: list[str] = []
    tables = []
    for name, field in table.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, SettingsModel):
            tables.append((name, field.description or "", value))
            continue
        came_from = origin(prefix + name)
        if came_from is None:
            lines += ["", *_documentation(field), *_assignment(name, value)]
        else:
            lines.append(f"{name} = {toml_value(value)}  # {plain_line(came_from)}")
    for name, description, value in tables:
        lines += ["", *textwrap.wrap(description, 118, initial_indent="# ", subsequent_indent="# ")]
        lines.append(f"[{prefix}{name}]")
        lines += _document(value, type(value), f"{prefix}{name}.", origin)
    return lines


def _documentation(field: FieldInfo) -> list[str]:
    """Return a field's description, when to change it, and its type, as comments."""
    lines: list[str] = []
    for text in (field.description or "", when_to_change(field)):
        lines += textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    return [*lines, f"# Type: {describe_type(field.annotation)}."]


def _assignment(name: str, value: Any) -> list[str]:
    """Return the lines of `name = value`, a long list on several lines."""
    line = f"{name} = {toml_value(value)}"
    if len(line) <= 118 or not isinstance(value, list):
        return [line]
    lines = [f"{name} = ["]
    for item in value:
        text = f"{toml_value(item)},"
        if len(lines) > 1 and len(lines[-1]) + len(text) < 112:
            lines[-1] += f" {text}"
        else:
            lines.append(f"    {text}")
    return [*lines, "]"]
