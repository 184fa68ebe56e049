"""Building blocks of the settings: documented fields, strict tables and validated value types."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from heretic.errors import UserError, plain_line
from heretic.files import expand_user

LONGEST_SECONDS = 31_536_000  # a year; far longer waits overflow the system's clocks


def setting(default: Any, description: str, *, when: str = "", affects_results: bool = True, **limits: Any) -> Any:
    """Declare a documented field.

    Args:
        default: a mutable default is copied for each instance.
        description: what the field means.
        when: a full sentence on when to change it and at what cost.
        affects_results: False if the field can change between sessions of one run.
        limits: bounds, as for `pydantic.Field`.
    """
    extra: Any = ({"when": when} if when else {}) | ({} if affects_results else {"affects_results": False}) or None
    if isinstance(default, (list, dict, BaseModel)):
        return Field(
            default_factory=lambda: _fresh(default), description=description, json_schema_extra=extra, **limits
        )
    return Field(default, description=description, json_schema_extra=extra, **limits)


def _fresh(value: Any) -> Any:
    return value.model_copy(deep=True) if isinstance(value, BaseModel) else value.copy()


class SettingsModel(BaseModel):
    """A TOML table that refuses unknown keys and wrong types."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


def when_to_change(field: FieldInfo) -> str:
    """Return the sentence on when to change a field; empty if it has none."""
    extra = field.json_schema_extra
    return str(extra.get("when", "")) if isinstance(extra, dict) else ""


def affects_results(field: FieldInfo) -> bool:
    """Return whether a change of the field starts a new run."""
    extra = field.json_schema_extra
    return bool(extra.get("affects_results", True)) if isinstance(extra, dict) else True


def fields_that_affect_results(table: SettingsModel) -> dict[str, Any]:
    """Return the values that affect results, as plain data."""
    fields = {}
    for name, field in type(table).model_fields.items():
        if not affects_results(field):
            continue
        value = getattr(table, name)
        is_table = isinstance(value, SettingsModel)
        fields[name] = fields_that_affect_results(value) if is_table else table.model_dump(include={name})[name]
    return fields


def not_twice(names: list[str]) -> list[str]:
    """Raise ValueError for a name that occurs twice."""
    if len(set(names)) < len(names):
        raise ValueError("a name occurs twice")
    return names


def _in_order(bounds: list[float]) -> list[float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the first number is the lower bound, but {bounds[0]:g} > {bounds[1]:g}")
    return bounds


def _home(path: str) -> str:
    try:
        expand_user(path)
    except UserError as error:
        raise ValueError(f"{plain_line(error.what).rstrip('.')}; write the absolute path or set HOME") from None
    return os.path.expanduser(path)


def one_name(name: str) -> str:
    """Return the name of a run's folder; raise ValueError for a path, which could lead outside `runs_dir`."""
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("it should be a name, not a path; set runs_dir for the folder above it")
    return name


PathText = Annotated[str, AfterValidator(_home)]


Range = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_in_order)]
