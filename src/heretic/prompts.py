"""Prompt sets: from a hub data set, a local file, or the package itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from heretic.errors import UserError, first_line
from heretic.files import expanded, read_text, split_lines
from heretic.prompt_rows import WHAT, prompt_in, rows_of
from heretic.settings import Prompts, PromptSource

BUNDLED = "bundled:"
TABLES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one role, in order, what they came from, and how many are `available` there."""

    role: str
    source: str
    prompts: tuple[str, ...]
    available: int

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


def load_all(sources: Prompts) -> PromptSets:
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
    return PromptSets(**sets, warnings=tuple(warnings))


def load(role: str, source: PromptSource) -> PromptSet:
    """Read one set. Raises UserError naming the setting."""
    key = f"prompts.{role}"
    if not source.source:
        raise UserError(
            f"The prompt set '{role}' has no source.", where=f"{key}.source", fix="name a data set or a file"
        )
    if source.source.startswith(BUNDLED):
        rows = _bundled(source.source[len(BUNDLED) :], key)
    elif (path := expanded(source.source)).suffix in (".txt", *TABLES):
        rows = _text_lines(path, key) if path.suffix == ".txt" else _file_prompts(source, path, key)
    elif os.path.isfile(path):  # before the hub is asked for a data set of this name
        raise UserError(
            f"What kind of file {source.source} is cannot be told from its name.",
            where=f"{key}.source",
            fix=f"let it end in one of: {', '.join(('.txt', *TABLES))}",
        )
    else:
        rows = _dataset_prompts(source, key)
    if not rows:
        raise UserError(
            f"The prompt set '{role}' is empty.", where=f"{key} = {source.source}", fix="add at least one prompt"
        )
    taken = _slice(rows, source.split, key)
    prompts = tuple(f"{source.prefix}{row}{source.suffix}" for row in taken)
    return PromptSet(role, source.source, prompts, len(rows))


def from_text_or_file(said: str) -> tuple[str, ...]:
    """The prompts of a file or bundled set; anything else is a prompt itself. Raises UserError for a file without any."""
    if not said.strip():
        raise UserError("The prompt is empty.", fix="write one, or name a file of prompts")
    path = expanded(said)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError:  # longer than a file's name can be
        return (said,)
    if is_folder:
        raise UserError("This is a folder, not a prompt or a file of prompts.", where=said, fix="name a file in it")
    if is_file or said.startswith(BUNDLED) or (path.suffix in (".txt", *TABLES) and not set(said) & set(" \n")):
        return load("prompts", PromptSource(source=str(path) if is_file else said)).prompts
    return (said,)


def bundled_names() -> list[str]:
    """Names of the sets that ship with the package."""
    folder = resources.files("heretic") / "demo" / "prompts"
    return sorted(f.name.removesuffix(".txt") for f in folder.iterdir() if f.name.endswith(".txt"))


def _bundled(name: str, key: str) -> list[str]:
    if name not in bundled_names():
        raise UserError(
            f"There is no bundled prompt set '{name}'.",
            where=f"{key}.source",
            fix="one of: " + ", ".join(bundled_names()),
        )
    text = (resources.files("heretic") / "demo" / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return _lines(text)


def _text_lines(path: Path, key: str) -> list[str]:
    return _lines(read_text(path, WHAT, where=f"{key}.source"))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in split_lines(text) if line.strip()]


def _file_prompts(source: PromptSource, path: Path, key: str) -> list[str]:
    """The column of a local table. A row that lacks the column, where others have it, counts as empty."""
    rows = rows_of(path, key)
    if rows and not any(source.column in row for _, row in rows):
        raise _no_column(source, list(rows[0][1]), key)
    unit = "line" if path.suffix in (".jsonl", ".csv") else "row"
    cells = ((f"{path}, {unit} {number}, column '{source.column}'", row.get(source.column)) for number, row in rows)
    return [prompt for place, cell in cells if (prompt := prompt_in(cell, place, key)) is not None]


def _dataset_prompts(source: PromptSource, key: str) -> list[str]:
    """The column of a data set, by the datasets library."""
    import datasets

    try:
        with_progress = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            table: Any = datasets.load_dataset(source.source, source.subset or None, split=_split_name(source.split))
        finally:
            if with_progress:
                datasets.enable_progress_bars()
    except Exception as error:  # the library raises dozens of kinds, all of them about this source
        local = Path(source.source).exists()
        raise UserError(
            f"The prompt set {source.source} cannot be read: {first_line(error)[:200]}",
            code="dataset-unreadable",
            where=f"{key}.source",
            fix="check the files in it, or name one file"
            if local
            else "check the name, the split and the network, or name a local file",
        ) from None
    if source.column not in table.column_names:
        raise _no_column(source, table.column_names, key)
    cells = (
        (f"{source.source}, row {number}, column '{source.column}'", cell)
        for number, cell in enumerate(table[source.column], start=1)
    )
    return [prompt for place, cell in cells if (prompt := prompt_in(cell, place, key)) is not None]


def _no_column(source: PromptSource, names: Sequence[str], key: str) -> UserError:
    return UserError(
        f"The prompt set {source.source} has no column '{source.column}'.",
        code="no-such-column",
        where=f"{key}.column",
        fix="one of: " + ", ".join(map(str, names)),
    )


_SPLIT = re.compile(r"^\s*([\w.-]*)\s*(?:\[\s*(\d*)\s*:\s*(\d*)\s*\])?\s*$")


def _split_name(split: str) -> str:
    match = _SPLIT.match(split)
    return (match.group(1) if match else "") or "train"


def _slice(rows: list[str], split: str, key: str) -> list[str]:
    """Apply the slice of `train[10:50]`; a slice that the set cannot fill is an error, not a smaller set."""
    match = _SPLIT.match(split)
    if match is None:
        raise UserError(f"'{split}' is no split.", where=f"{key}.split", fix='write it like "train" or "train[:400]"')
    start = int(match.group(2) or 0)
    stop = int(match.group(3)) if match.group(3) else len(rows)
    if stop > len(rows) or start >= stop:
        raise UserError(
            f"The split {split} asks for prompts {start} to {stop}, but there are {len(rows)}.",
            where=f"{key}.split",
            fix=f"at most [:{len(rows)}]",
        )
    return rows[start:stop]
