"""The files that go with a model's weights: config, tokenizer, processor, templates, code that these name, licenses."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from heretic.files import sha256, write_text
from heretic.model.repository import kind_of, names_in, resolve_inside
from heretic.progress import NULL_REPORTER, ProgressReporter

TEMPLATE = "chat_template.jinja"
OF_THE_EXPORT = ("README.md", "manifest.json", "heretic")  # each export has its own
NAMED = 3  # files in a message


@dataclass
class Companions:
    """The files of a model's folder that go into an export, by their path from there, and the names of what does not.

    `changed` holds the new text of those that are not copied as they are.
    """

    copied: dict[str, Path] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def copied_files(folder: Path) -> dict[str, Path]:
    """Everything beside the weights that loading and using the model needs, by its path from the folder. Raises UserError."""
    return find_companions(folder).copied


def find_companions(folder: Path, template: str = "", texts: Mapping[str, str] | None = None) -> Companions:
    """Decide by name and reference what is copied of a model's folder.

    Args:
        folder: The base model's.
        template: A chat template that takes the place of the model's own.
        texts: New texts of files, by name, in place of those in the folder.

    Raises:
        UserError: A link that leads out of the folder.
    """
    found = Companions()
    code: set[str] = set()
    for name in names_in(folder):
        kind = kind_of(name)
        if kind in ("support", "terms") and (file := resolve_inside(folder, folder / name)).is_file():
            found.copied[name] = file
        elif kind == "code":
            code.add(name)
        elif kind == "other" and not name.startswith(".") and name not in OF_THE_EXPORT:
            found.left.append(f"{name}/" if (folder / name).is_dir() else name)
    found.changed |= texts or {}
    _add_code(folder, code, found)
    if template:
        _put_template(found, template)
    return found


def copy_companions(
    folder: Path,
    to: Path,
    *,
    template: str = "",
    but: Collection[str] = (),
    texts: Mapping[str, str] | None = None,
    reporter: ProgressReporter = NULL_REPORTER,
) -> dict[str, dict[str, str]]:
    """Copy what goes with the weights into an export, but for the files named in `but`.

    Returns SHA-256 by name: "copied" for files as they were, "changed" for those of which something had to be dropped or replaced.
    """
    found = find_companions(folder, template, texts)
    for name in [n for n in found.copied if n not in found.changed and n not in but]:
        (to / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(found.copied[name], to / name)
    for name in (changed := [n for n in found.changed if n not in but]):
        (to / name).parent.mkdir(exist_ok=True)
        write_text(to / name, found.changed[name])
    copied = [n for n in found.copied if n not in found.changed and n not in but]
    if found.left:
        more = f" and {len(found.left) - NAMED} more" if len(found.left) > NAMED else ""
        reporter.info(f"Not copied from the base model's folder: {', '.join(found.left[:NAMED])}{more}.")
    return {name: {n: sha256(to / n) for n in names} for name, names in (("copied", copied), ("changed", changed))}


def copy_license_files(folder: Path, to: Path, template: str) -> None:
    """Copy the base model's licenses and notices where the format has not: its terms go with what is made of it. A chat template of
    the settings is written whatever the format."""
    for name, file in copied_files(folder).items():
        if kind_of(name) == "terms" and not (to / name).exists():
            (to / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to / name)
    if template and not (to / TEMPLATE).exists():
        write_text(to / TEMPLATE, template)


def _add_code(folder: Path, code: Collection[str], found: Companions) -> None:
    """Add the Python files that configs name in `auto_map` and all that these import; drop entries whose file there is not."""
    needed: set[str] = set()
    for name in [n for n in found.copied if n.endswith("config.json")]:
        data = json.loads(found.changed[name]) if name in found.changed else _read_config(found.copied[name])
        if not isinstance(data, dict) or "auto_map" not in data:
            continue
        references = [r for r in _leaves(data["auto_map"]) if isinstance(r, str)]
        kept = _pruned(data["auto_map"], lambda reference: _local_file(reference) in (None, *code))
        needed |= {local for r in references if (local := _local_file(r)) is not None and local in code}
        if kept != data["auto_map"]:
            rest = {key: value for key, value in data.items() if key != "auto_map"}
            data = {**rest, "auto_map": kept} if kept else rest
            found.changed[name] = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    texts = ""
    while needed:
        name = needed.pop()
        file = resolve_inside(folder, folder / name)
        found.copied[name] = file
        with contextlib.suppress(UnicodeDecodeError):
            imported = {f"{module}.py" for module in get_relative_imports(file)}
            needed |= {other for other in imported if other in code and other not in found.copied}
            texts += file.read_text(encoding="utf-8")
    # Tokenizers with their own code have vocabularies of any name, which they name.
    for name in [n for n in found.left if f'"{n}"' in texts or f"'{n}'" in texts]:
        file = resolve_inside(folder, folder / name)
        if file.is_file():
            found.copied[name] = file
            found.left.remove(name)
    found.left += sorted(name for name in code if name not in found.copied)


def _read_config(file: Path) -> Any:
    """What a JSON file holds; None for one that cannot be read, which is copied as it is."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _local_file(reference: str) -> str | None:
    """'modeling_x.py' of 'modeling_x.XModel'; None for a class in another repository, 'owner/name--modeling_x.XModel'."""
    return None if "--" in reference else f"{reference.split('.')[0]}.py"


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    return [leaf for inner in value for leaf in _leaves(inner)] if isinstance(value, list) else [value]


def _pruned(value: Any, exists: Callable[[str], bool]) -> Any:
    """An `auto_map`, or the value of one, without references that lead nowhere; empty where nothing is left."""
    if isinstance(value, Mapping):
        return {key: kept for key, inner in value.items() if (kept := _pruned(inner, exists))}
    if isinstance(value, list):
        kept = [_pruned(inner, exists) for inner in value]
        return kept if any(kept) else None
    return value if not isinstance(value, str) or exists(value) else None


def _put_template(found: Companions, template: str) -> None:
    """Write a template where all programs read it, and take the model's own out of the files in which some look first.

    llama.cpp's converter prefers `chat_template` in tokenizer_config.json, and transformers refuses chat_template.json beside
    further templates. Templates of other names stay.
    """
    found.changed[TEMPLATE] = template
    found.copied.pop("chat_template.json", None)
    for name in ("tokenizer_config.json", "processor_config.json"):
        if name not in found.copied:
            continue
        data = json.loads(found.changed[name]) if name in found.changed else _read_config(found.copied[name])
        if not isinstance(data, dict) or "chat_template" not in data:
            continue
        own = data.pop("chat_template")
        for entry in own if isinstance(own, list) else ():
            other, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            if isinstance(other, str) and isinstance(text, str) and other.isidentifier() and other != "default":
                found.changed[f"additional_chat_templates/{other}.jinja"] = text
        found.changed[name] = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
