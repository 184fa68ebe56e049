"""What every table of settings is made of: documented fields, strict tables, and checked types of values."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from heretic.errors import UserError, plain_line
from heretic.files import expand_user

LONGEST_SECONDS = 31_536_000  # a year; far longer waits overflow the system's clocks


def setting(default: Any, description: str, *, when: str = "", neutral: bool = False, **limits: Any) -> Any:
    """A documented field: what it is, and `when` to change it and at what cost; `neutral`: it can't change a study's results."""
    extra: Any = {name: value for name, value in (("when", when), ("neutral", neutral)) if value} or None
    if isinstance(default, (list, dict, BaseModel)):
        return Field(
            default_factory=lambda: _fresh(default), description=description, json_schema_extra=extra, **limits
        )
    return Field(default, description=description, json_schema_extra=extra, **limits)


def _fresh(value: Any) -> Any:
    return value.model_copy(deep=True) if isinstance(value, BaseModel) else value.copy()


class SettingsModel(BaseModel):
    """A TOML table: unknown keys and wrong types are refused, never guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


def field_metadata(field: FieldInfo, name: str) -> Any:
    """What `setting` wrote down beside the description: `when`, a text, or `neutral`."""
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def _in_order(bounds: list[float]) -> list[float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the first number is the lower bound, but {bounds[0]:g} > {bounds[1]:g}")
    return bounds


def _home(path: str) -> str:
    try:
        expand_user(path)
    except UserError as error:
        raise ValueError(f"{plain_line(error.what).rstrip('.')}; write the whole path or set HOME") from None
    return os.path.expanduser(path)


def one_name(name: str) -> str:
    """The name of a folder in another: no path, which could lead to where other runs or other things are."""
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("it should be a name, not a path; runs_dir says where the run's folder is")
    return name


PathText = Annotated[str, AfterValidator(_home)]


Range = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_in_order)]
