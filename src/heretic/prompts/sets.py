"""Load prompt sets from a hub data set, a local file or the package."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from heretic.errors import UserError, cache_error, first_line, is_unicode, plain_line
from heretic.files import expand_user, open_regular, read_text, split_lines
from heretic.prompts.rows import WHAT, has_other_turns, prompt_in, read_rows
from heretic.settings import PromptSettings, PromptSource
from heretic.settings.languages import LANGUAGES, language

BUNDLED = "bundled:"
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst", ".7z")
COLUMNS = ("text", "prompt", "messages", "conversations")  # without a setting, the first of these that a table has
HUB_TIMEOUT = 5  # seconds
MANY_REPEATED = 0.05  # share of a set's prompts above which repetitions are a warning


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one role, in order."""

    role: str
    source: str
    prompts: tuple[str, ...]
    available: int  # prompts in the source
    n_truncated: int = 0  # conversations in the source that have more than their last user turn

    @property
    def sha256(self) -> str:
        """SHA-256 hash of the prompts, so that an edited file counts as another set."""
        return hashlib.sha256(json.dumps(self.prompts, ensure_ascii=False).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class PromptSets:
    """The four prompt sets of a run, with warnings about them."""

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
        """Used and available prompts by role, for example 'harmful_train 400 of 416, ...'."""
        counts = (f"{len(s)} of {s.available}" if s.available > len(s) else str(len(s)) for s in self.all)
        return ", ".join(f"{s.role} {count}" for s, count in zip(self.all, counts, strict=True))

    @property
    def longest(self) -> int:
        """Length of the longest prompt in characters."""
        return max(len(p) for s in self.all for p in s.prompts)


def load_all(sources: PromptSettings) -> PromptSets:
    """Load all four sets and check them for overlap. Raises UserError."""
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
    for part in ("train", "eval"):
        both = set(sets[f"harmful_{part}"].prompts) & set(sets[f"harmless_{part}"].prompts)
        if both:
            warnings.append(f"{len(both)} prompts are in prompts.harmful_{part} and in prompts.harmless_{part}.")
    for role, prompt_set in sets.items():
        repeated = len(prompt_set) - len(set(prompt_set.prompts))
        if repeated > MANY_REPEATED * len(prompt_set):
            warnings.append(f"{repeated} of {len(prompt_set)} prompts in prompts.{role} are repetitions.")
    warnings += [
        f"{prompt_set.n_truncated} of {prompt_set.available} conversations in prompts.{role} have a system message or "
        "earlier turns. heretic uses only the last user turn of each."
        for role, prompt_set in sets.items()
        if prompt_set.n_truncated
    ]
    return PromptSets(**sets, warnings=tuple(warnings))


def load(role: str, source: PromptSource, key: str = "") -> PromptSet:
    """Load one set. Raises UserError, which names the setting `key`; default: that of the role."""
    key = key or f"prompts.{role}"
    if not source.source:
        raise UserError(
            f"The prompt set '{role}' has no source.",
            code="no-prompts",
            where=f"{key}.source",
            fix="set it to a data set or a file",
        )
    loaded = _load_source(source, (source.column,), key)
    if not loaded.prompts:
        raise UserError(
            f"The prompt set '{role}' is empty.",
            code="no-prompts",
            where=f"{key} = {source.source}",
            fix="add at least one prompt",
        )
    rows = _slice(loaded.prompts, source.split, key)
    prompts = tuple(f"{source.prefix}{row}{source.suffix}" for row in rows)
    return PromptSet(role, source.source, prompts, len(loaded.prompts), loaded.n_truncated)


def from_text_or_file(text: str) -> tuple[str, ...]:
    """Return the prompts of a file or bundled set, or the text itself as the only prompt.

    A table's prompts come from the first of `COLUMNS` that it has. Raises UserError for a file without prompts.
    """
    if not text.strip():
        raise UserError("The prompt is empty.", code="no-prompts", fix="write a prompt or the path of a prompt file")
    if not is_unicode(text):
        raise UserError("The prompt is not valid UTF-8.", code="not-a-prompt", fix="write it in UTF-8")
    looks_like_a_file = Path(text).suffix.lower() in (".txt", *TABLES) and not set(text) & set(" \n")
    try:
        path = expand_user(text)
    except UserError:  # a ~ that stands for no home folder
        if looks_like_a_file:
            raise
        return (text,)
    exists = "\0" not in text and os.path.exists(path)
    if exists and os.path.isdir(path):
        raise UserError(
            "This is a folder, not a prompt or a prompt file.",
            code="not-a-regular-file",
            where=text,
            fix="choose a file in it",
        )
    if not (exists or looks_like_a_file or text.startswith(BUNDLED)):
        return (text,)
    loaded = _load_source(PromptSource(source=str(path) if exists else text), COLUMNS, "")
    if not loaded.prompts:
        raise UserError("The file has no prompts.", code="no-prompts", where=text, fix="add at least one prompt")
    return tuple(loaded.prompts)


@dataclass(frozen=True)
class _LoadedPrompts:
    prompts: list[str]
    n_truncated: int = 0


def _load_source(source: PromptSource, columns: Sequence[str], key: str) -> _LoadedPrompts:
    """Load all prompts of a source.

    Args:
        source: the source.
        columns: names of the prompt column, of which the first that exists is used.
        key: the setting, for messages; empty if there is none.
    """
    name = source.source
    if name.startswith(BUNDLED):
        return _LoadedPrompts(_bundled(name[len(BUNDLED) :], key))
    path = expand_user(name)
    if path.suffix.lower() == ".txt":
        return _LoadedPrompts(_lines(read_text(path, WHAT, where=f"{key}.source" if key else None)))
    if path.suffix.lower() in TABLES:
        return _file_prompts(source, path, columns, key)
    if os.path.exists(path) and not os.path.isdir(path):  # checked before the hub, which could have this name too
        where = f"{key}.source" if key else name
        open_regular(path, WHAT, where=where).close()
        raise UserError(
            f"The prompt file {name} has an unknown extension.",
            code="unknown-file-kind",
            where=where,
            fix="decompress it first"
            if path.suffix.lower() in COMPRESSED
            else f"save it as one of: {', '.join(('.txt', *TABLES))}",
        )
    return _dataset_prompts(source, columns, key)


def bundled_names() -> list[str]:
    """Return the names of the prompt sets that ship with the package, also of the languages', such as `de/harmful_train`."""
    folder = resources.files("heretic") / "data" / "prompts"
    files = sorted(f.name.removesuffix(".txt") for f in folder.iterdir() if f.name.endswith(".txt"))
    return files + [f"{code}/{role}" for code in LANGUAGES for role in language(code).prompts]


def _bundled(name: str, key: str) -> list[str]:
    if name not in bundled_names():
        raise UserError(
            f"Unknown bundled prompt set '{name}'.",
            code="no-such-prompt-set",
            where=f"{key}.source" if key else None,
            fix="use one of: " + ", ".join(bundled_names()),
        )
    code, slash, role = name.partition("/")
    if slash:
        return list(language(code).prompts[role])
    text = (resources.files("heretic") / "data" / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return _lines(text)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in split_lines(text) if line.strip()]


def _file_prompts(source: PromptSource, path: Path, columns: Sequence[str], key: str) -> _LoadedPrompts:
    """Load the prompt column of a local table; rows without it count as empty if other rows have it."""
    rows = read_rows(path, key, columns)
    if not rows:
        return _LoadedPrompts([])
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    column = next((column for column in columns if column in names), None)
    if column is None:
        raise _no_column(source.source, columns, names, key)
    unit = "line" if path.suffix.lower() in (".jsonl", ".csv", ".tsv") else "row"
    cells = ((f"{path}, {unit} {number}, column '{column}'", row.get(column)) for number, row in rows)
    return _prompts_in(cells, key, source.split)


def _dataset_prompts(source: PromptSource, columns: Sequence[str], key: str) -> _LoadedPrompts:
    """Load the prompt column of a hub data set."""
    import datasets

    with_progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    local, hub_error = Path(source.source).exists(), ""
    try:
        with nullcontext("") if local else _cache_only_without_hub() as hub_error:
            if local and (Path(source.source) / "state.json").is_file():  # written by Dataset.save_to_disk
                table: Any = datasets.load_from_disk(source.source)
                if (name := _split_name(source.split)) not in ("train", str(table.split)):
                    raise ValueError(f"it has no split {name!r}, only {table.split or 'train'}")
            else:
                table = datasets.load_dataset(source.source, source.subset or None, split=_split_name(source.split))
        column = next((c for c in columns if c in table.column_names), None)
        cells = list(table[column]) if column else []  # decoding can fail for images and sounds
    except Exception as error:  # the library raises dozens of error classes, all about this source
        caches = {"HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE}
        if disk := None if local else cache_error(error, caches):
            raise disk from None
        # What the library raises for a set that is not in its cache.
        missing = isinstance(error, (ConnectionError, FileNotFoundError))
        cause = hub_error if hub_error and missing else _cause(error)
        raise UserError(
            f"The prompt set {source.source} cannot be read: {plain_line(cause[:200])}",
            code="dataset-unreadable",
            where=f"{key}.source" if key else None,
            fix="check its files, or use one file as the source"
            if local
            else "check the name, the split and the network, or use a local file",
        ) from None
    finally:
        if with_progress:
            datasets.enable_progress_bars()
    if column is None:
        raise _no_column(source.source, columns, table.column_names, key)
    places = (f"{source.source}, row {number}, column '{column}'" for number in range(1, len(cells) + 1))
    return _prompts_in(zip(places, cells, strict=True), key, source.split)


@contextmanager
def _cache_only_without_hub() -> Iterator[str]:
    """Let `datasets` use its cache only if the hub does not answer: the libraries would retry for 10 seconds a data set.

    Yields why the hub does not answer; empty if it does, or if nobody asked it.
    """
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub_error = "" if any(before) else _hub_error(constants.ENDPOINT, int(time.monotonic() / 60))
    if hub_error:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield hub_error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@lru_cache(maxsize=1)
def _hub_error(endpoint: str, _minute: int) -> str:
    """Return why the hub sends no response at all, asked twice a minute at most; empty if it sends one.

    A proxy of the environment is used.
    """
    from huggingface_hub import get_session

    cause = ""
    for _ in range(2):
        try:
            get_session().head(endpoint, timeout=HUB_TIMEOUT)
        except Exception as error:  # of the HTTP library, whose classes change
            cause = first_line(error)
        else:
            return ""
    return f"no copy in the cache, and {endpoint} does not answer ({cause})"


def _prompts_in(cells: Iterable[tuple[str, Any]], key: str, split: str) -> _LoadedPrompts:
    """Extract the prompts. Cells after the end of the split's slice need not be prompts."""
    match = _SPLIT.match(split)
    end = int(match.group(3)) if match and match.group(3) else None
    prompts: list[str] = []
    n_truncated = 0
    for place, cell in cells:
        try:
            prompt = prompt_in(cell, place, key)
        except UserError:
            if end is None or len(prompts) < end:
                raise
            continue
        if prompt is not None:
            prompts.append(prompt)
            n_truncated += has_other_turns(cell)
    return _LoadedPrompts(prompts, n_truncated)


def _cause(error: BaseException) -> str:
    """Return the first line of the first error in a chain; the library wraps it in less specific ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _no_column(name: str, columns: Sequence[str], names: Sequence[Any], key: str) -> UserError:
    return UserError(
        f"The prompt set {name} has no column '{columns[0]}'.",
        code="no-such-column",
        where=f"{key}.column" if key else None,
        fix="use one of: " + ", ".join(plain_line(str(known)) for known in names[:20]),
    )


_SPLIT = re.compile(r"^\s*([\w.-]*)\s*(?:\[\s*(\d*)\s*:\s*(\d*)\s*\])?\s*$")


def _split_name(split: str) -> str:
    match = _SPLIT.match(split)
    return (match.group(1) if match else "") or "train"


def _slice(rows: list[str], split: str, key: str) -> list[str]:
    """Apply the slice of a split such as `train[10:50]`. Raises UserError for a slice beyond the end."""
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
            f"The split {split} needs prompts {start} to {stop}, but the set has {len(rows)}.",
            code="split-out-of-range",
            where=f"{key}.split",
            fix=f"use at most [:{len(rows)}]",
        )
    return rows[start:stop]
