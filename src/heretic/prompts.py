"""Prompt sets: from a hub data set, a local file, or the package itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from heretic.errors import UserError, first_line, plain_line
from heretic.files import expand_user, open_regular, read_text, split_lines
from heretic.prompt_rows import WHAT, leaves_turns_out, prompt_in, rows_of
from heretic.settings import PromptSettings, PromptSource

BUNDLED = "bundled:"
TABLES = (".jsonl", ".json", ".csv", ".parquet")
COLUMNS = ("text", "prompt", "messages", "conversations")  # of a table that no setting describes: the first that it has


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one role, in order, what they came from, and how many are `available` there."""

    role: str
    source: str
    prompts: tuple[str, ...]
    available: int
    n_truncated: int = 0  # rows of the source of which the prompt is only the last user turn

    @property
    def sha256(self) -> str:
        """Hash of the prompts themselves, so that an edited file counts as another set."""
        return hashlib.sha256(json.dumps(self.prompts, ensure_ascii=False).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class PromptSets:
    """The four sets of a run, and what is doubtful about them."""

    harmful_train: PromptSet
    harmless_train: PromptSet
    harmful_eval: PromptSet
    harmless_eval: PromptSet
    warnings: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[PromptSet, ...]:
        """The four sets in a fixed order."""
        return (self.harmful_train, self.harmless_train, self.harmful_eval, self.harmless_eval)

    @property
    def counts(self) -> str:
        """How many of how many prompts, by role: a split may cut more off than was meant."""
        each = (f"{len(s)} of {s.available}" if s.available > len(s) else str(len(s)) for s in self.all)
        return ", ".join(f"{s.role} {count}" for s, count in zip(self.all, each, strict=True))

    @property
    def longest(self) -> int:
        """Length of the longest prompt in characters."""
        return max(len(p) for s in self.all for p in s.prompts)


def load_all(sources: PromptSettings) -> PromptSets:
    """Read all four sets and compare them. Raises UserError."""
    sets = {role: load(role, getattr(sources, role)) for role in type(sources).model_fields}
    warnings = []
    for kind in ("harmful", "harmless"):
        train, evaluation = sets[f"{kind}_train"], sets[f"{kind}_eval"]
        shared = set(train.prompts) & set(evaluation.prompts)
        if shared:
            warnings.append(
                f"{len(shared)} of {len(evaluation)} prompts in prompts.{kind}_eval are also in prompts.{kind}_train, "
                "so the scores will look better than they are."
            )
    warnings += [
        f"{one.n_truncated} of {one.available} conversations in prompts.{role} have a system message or earlier turns. "
        "Only the last user turn of each is the prompt."
        for role, one in sets.items()
        if one.n_truncated
    ]
    return PromptSets(**sets, warnings=tuple(warnings))


def load(role: str, source: PromptSource) -> PromptSet:
    """Read one set. Raises UserError naming the setting."""
    key = f"prompts.{role}"
    if not source.source:
        raise UserError(
            f"The prompt set '{role}' has no source.",
            code="no-prompts",
            where=f"{key}.source",
            fix="name a data set or a file",
        )
    found = _read(source, (source.column,), key)
    if not found.prompts:
        raise UserError(
            f"The prompt set '{role}' is empty.",
            code="no-prompts",
            where=f"{key} = {source.source}",
            fix="add at least one prompt",
        )
    taken = _slice(found.prompts, source.split, key)
    prompts = tuple(f"{source.prefix}{row}{source.suffix}" for row in taken)
    return PromptSet(role, source.source, prompts, len(found.prompts), found.shortened)


def from_text_or_file(said: str) -> tuple[str, ...]:
    """The prompts of a file or bundled set; anything else is a prompt itself. Raises UserError for a file without any.

    Of a table, the first of `COLUMNS` that it has is read.
    """
    if not said.strip():
        raise UserError("The prompt is empty.", code="no-prompts", fix="write one, or name a file of prompts")
    if any("\ud800" <= c <= "\udfff" for c in said):  # bytes that are not UTF-8, on a command line or a terminal
        raise UserError("The prompt is not valid text in UTF-8.", code="not-a-prompt", fix="write it in UTF-8")
    looks_like_a_file = Path(said).suffix.lower() in (".txt", *TABLES) and not set(said) & set(" \n")
    try:
        path = expand_user(said)
    except UserError:  # a ~ that stands for no home folder
        if looks_like_a_file:
            raise
        return (said,)
    is_there = "\0" not in said and os.path.exists(path)
    if is_there and os.path.isdir(path):
        raise UserError(
            "This is a folder, not a prompt or a file of prompts.",
            code="not-a-regular-file",
            where=said,
            fix="name a file in it",
        )
    if not (is_there or looks_like_a_file or said.startswith(BUNDLED)):
        return (said,)
    found = _read(PromptSource(source=str(path) if is_there else said), COLUMNS, "")
    if not found.prompts:
        raise UserError("The file has no prompts.", code="no-prompts", where=said, fix="add at least one prompt")
    return tuple(found.prompts)


@dataclass(frozen=True)
class _LoadedPrompts:
    prompts: list[str]
    shortened: int = 0


def _read(source: PromptSource, columns: Sequence[str], key: str) -> _LoadedPrompts:
    """All prompts of a source, from the first of `columns` that it has; `key` is the setting, empty if there is none."""
    name = source.source
    if name.startswith(BUNDLED):
        return _LoadedPrompts(_bundled(name[len(BUNDLED) :], key))
    path = expand_user(name)
    if path.suffix.lower() == ".txt":
        return _LoadedPrompts(_lines(read_text(path, WHAT, where=f"{key}.source" if key else None)))
    if path.suffix.lower() in TABLES:
        return _file_prompts(name, path, columns, key)
    if os.path.exists(path) and not os.path.isdir(path):  # before the hub is asked for a data set of this name
        where = f"{key}.source" if key else name
        open_regular(path, WHAT, where=where).close()
        raise UserError(
            f"The name {name} does not show the kind of file.",
            code="unknown-file-kind",
            where=where,
            fix=f"rename it to end in one of: {', '.join(('.txt', *TABLES))}",
        )
    return _dataset_prompts(source, columns, key)


def bundled_names() -> list[str]:
    """Names of the sets that ship with the package."""
    folder = resources.files("heretic") / "data" / "prompts"
    return sorted(f.name.removesuffix(".txt") for f in folder.iterdir() if f.name.endswith(".txt"))


def _bundled(name: str, key: str) -> list[str]:
    if name not in bundled_names():
        raise UserError(
            f"There is no bundled prompt set '{name}'.",
            code="no-such-prompt-set",
            where=f"{key}.source" if key else None,
            fix="one of: " + ", ".join(bundled_names()),
        )
    text = (resources.files("heretic") / "data" / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return _lines(text)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in split_lines(text) if line.strip()]


def _file_prompts(name: str, path: Path, columns: Sequence[str], key: str) -> _LoadedPrompts:
    """The column of a local table. A row that lacks the column, where others have it, counts as empty."""
    for column in columns:
        rows = rows_of(path, key, column)
        if not rows:
            return _LoadedPrompts([])
        if any(column in row for _, row in rows):
            unit = "line" if path.suffix.lower() in (".jsonl", ".csv") else "row"
            cells = ((f"{path}, {unit} {number}, column '{column}'", row.get(column)) for number, row in rows)
            return _prompts_in(cells, key)
    raise _no_column(name, columns, list(dict.fromkeys(n for _, row in rows for n in row)), key)


def _dataset_prompts(source: PromptSource, columns: Sequence[str], key: str) -> _LoadedPrompts:
    """The column of a data set, by the datasets library."""
    import datasets

    with_progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table: Any = datasets.load_dataset(source.source, source.subset or None, split=_split_name(source.split))
        column = next((c for c in columns if c in table.column_names), None)
        cells = list(table[column]) if column else []  # decodes them, which may fail for images and sounds
    except Exception as error:  # the library raises dozens of kinds, all of them about this source
        local = Path(source.source).exists()
        raise UserError(
            f"The prompt set {source.source} cannot be read: {plain_line(_cause(error)[:200])}",
            code="dataset-unreadable",
            where=f"{key}.source" if key else None,
            fix="check the files in it, or name one file"
            if local
            else "check the name, the split and the network, or name a local file",
        ) from None
    finally:
        if with_progress:
            datasets.enable_progress_bars()
    if column is None:
        raise _no_column(source.source, columns, table.column_names, key)
    places = (f"{source.source}, row {number}, column '{column}'" for number in range(1, len(cells) + 1))
    return _prompts_in(zip(places, cells, strict=True), key)


def _prompts_in(cells: Iterable[tuple[str, Any]], key: str) -> _LoadedPrompts:
    found, shortened = [], 0
    for place, cell in cells:
        if (prompt := prompt_in(cell, place, key)) is not None:
            found.append(prompt)
            shortened += leaves_turns_out(cell)
    return _LoadedPrompts(found, shortened)


def _cause(error: BaseException) -> str:
    """The first line of the first error in a chain: the library wraps it in others that say less."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _no_column(name: str, columns: Sequence[str], names: Sequence[Any], key: str) -> UserError:
    return UserError(
        f"The prompt set {name} has no column '{columns[0]}'.",
        code="no-such-column",
        where=f"{key}.column" if key else None,
        fix="one of: " + ", ".join(plain_line(str(known)) for known in names[:20]),
    )


_SPLIT = re.compile(r"^\s*([\w.-]*)\s*(?:\[\s*(\d*)\s*:\s*(\d*)\s*\])?\s*$")


def _split_name(split: str) -> str:
    match = _SPLIT.match(split)
    return (match.group(1) if match else "") or "train"


def _slice(rows: list[str], split: str, key: str) -> list[str]:
    """Apply the slice of `train[10:50]`; a slice that the set cannot fill is an error, not a smaller set."""
    match = _SPLIT.match(split)
    if match is None:
        raise UserError(
            f"Invalid split: '{split}'.",
            code="invalid-split",
            where=f"{key}.split",
            fix='write it like "train" or "train[:400]"',
        )
    start = int(match.group(2) or 0)
    stop = int(match.group(3)) if match.group(3) else len(rows)
    if stop > len(rows) or start >= stop:
        raise UserError(
            f"The split {split} asks for prompts {start} to {stop}, but there are {len(rows)}.",
            code="split-out-of-range",
            where=f"{key}.split",
            fix=f"at most [:{len(rows)}]",
        )
    return rows[start:stop]
