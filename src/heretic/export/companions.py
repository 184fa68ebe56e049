"""Copy the files that accompany the weights: config, tokenizer, processor, templates, their code, licenses."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from heretic.export.destination import abbreviated
from heretic.files import sha256, write_text
from heretic.model.repository import kind_of, names_in, resolve_inside
from heretic.progress import NULL_REPORTER, ProgressReporter

TEMPLATE = "chat_template.jinja"
OF_THE_EXPORT = ("README.md", "manifest.json", "heretic")  # each export has its own


@dataclass
class Companions:
    """The files of a model's folder that go into an export, by their relative path."""

    copied: dict[str, Path] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)  # new text of files that are not copied unchanged
    left: list[str] = field(default_factory=list)  # names of what is not exported


def copied_files(folder: Path) -> dict[str, Path]:
    """Return all files but the weights that loading the model needs, by relative path. Raises UserError."""
    return find_companions(folder).copied


def find_companions(folder: Path, template: str = "", texts: Mapping[str, str] | None = None) -> Companions:
    """Select the files of a model's folder to export, by name and by reference.

    Args:
        folder: The base model's.
        template: A chat template that replaces the model's own.
        texts: New texts of files, by name.

    Raises:
        UserError: A link leads out of the folder.
    """
    companions = Companions()
    code: set[str] = set()
    for name in names_in(folder):
        kind = kind_of(name)
        if kind in ("support", "terms") and (file := resolve_inside(folder, folder / name)).is_file():
            companions.copied[name] = file
        elif kind == "code":
            code.add(name)
        elif kind == "other" and not name.startswith(".") and name not in OF_THE_EXPORT:
            companions.left.append(f"{name}/" if (folder / name).is_dir() else name)
    companions.changed |= texts or {}
    _add_code(folder, code, companions)
    if template:
        _replace_template(companions, template)
    return companions


def copy_companions(
    folder: Path,
    to: Path,
    *,
    template: str = "",
    but: Collection[str] = (),
    unused: Collection[str] = (),
    texts: Mapping[str, str] | None = None,
    reporter: ProgressReporter = NULL_REPORTER,
) -> dict[str, dict[str, str]]:
    """Copy the files that accompany the weights into an export, except those named in `but` and weights that are `unused`.

    Returns:
        SHA-256 by name, under "copied" for unchanged files and under "changed" for edited ones.
    """
    companions, but = find_companions(folder, template, texts), {*but, *unused}
    for name in [n for n in companions.copied if n not in companions.changed and n not in but]:
        (to / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(companions.copied[name], to / name)
    for name in (changed := [n for n in companions.changed if n not in but]):
        (to / name).parent.mkdir(exist_ok=True)
        write_text(to / name, companions.changed[name])
    copied = [n for n in companions.copied if n not in companions.changed and n not in but]
    if left := [*unused, *companions.left]:
        reporter.info(f"Not copied from the base model's folder: {abbreviated(left)}.")
    return {name: {n: sha256(to / n) for n in names} for name, names in (("copied", copied), ("changed", changed))}


def copy_license_files(folder: Path, to: Path, template: str) -> None:
    """Copy the base model's licenses and notices if the format has not, and write the chat template of the settings."""
    for name, file in copied_files(folder).items():
        if kind_of(name) == "terms" and not (to / name).exists():
            (to / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to / name)
    if template and not (to / TEMPLATE).exists():
        write_text(to / TEMPLATE, template)


def _config(companions: Companions, name: str) -> Any:
    """Return a config file's content, with the changes so far."""
    return json.loads(companions.changed[name]) if name in companions.changed else _read_config(companions.copied[name])


def _add_code(folder: Path, code: Collection[str], companions: Companions) -> None:
    """Add the Python files named in `auto_map` and their imports; drop entries whose file is missing."""
    needed: set[str] = set()
    for name in [n for n in companions.copied if n.endswith("config.json")]:
        data = _config(companions, name)
        if not isinstance(data, dict) or "auto_map" not in data:
            continue
        references = [r for r in leaves(data["auto_map"]) if isinstance(r, str)]
        existing = _existing_references(data["auto_map"], lambda reference: _local_file(reference) in (None, *code))
        needed |= {local for r in references if (local := _local_file(r)) is not None and local in code}
        if existing != data["auto_map"]:
            others = {key: value for key, value in data.items() if key != "auto_map"}
            data = {**others, "auto_map": existing} if existing else others
            companions.changed[name] = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    texts = ""
    while needed:
        name = needed.pop()
        file = resolve_inside(folder, folder / name)
        companions.copied[name] = file
        with contextlib.suppress(UnicodeDecodeError):
            imported = {f"{module}.py" for module in get_relative_imports(file)}
            needed |= {other for other in imported if other in code and other not in companions.copied}
            texts += file.read_text(encoding="utf-8")
    # The code of tokenizers names their vocabulary files.
    for name in [n for n in companions.left if f'"{n}"' in texts or f"'{n}'" in texts]:
        file = resolve_inside(folder, folder / name)
        if file.is_file():
            companions.copied[name] = file
            companions.left.remove(name)
    companions.left += sorted(name for name in code if name not in companions.copied)


def _read_config(file: Path) -> Any:
    """Content of a JSON file; None if it cannot be read, so that it is copied unchanged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _local_file(reference: str) -> str | None:
    """'modeling_x.py' of 'modeling_x.XModel'; None for a class in another repository, 'owner/name--modeling_x.XModel'."""
    return None if "--" in reference else f"{reference.split('.')[0]}.py"


def leaves(value: Any) -> list[Any]:
    """Return the values in nested mappings and lists."""
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]


def _existing_references(value: Any, exists: Callable[[str], bool]) -> Any:
    """An `auto_map`, or a value of one, without references to missing files; empty if none remains."""
    if isinstance(value, Mapping):
        return {key: existing for key, inner in value.items() if (existing := _existing_references(inner, exists))}
    if isinstance(value, list):
        existing = [_existing_references(inner, exists) for inner in value]
        return existing if any(existing) else None
    return value if not isinstance(value, str) or exists(value) else None


def _replace_template(companions: Companions, template: str) -> None:
    """Put the template into chat_template.jinja, and remove the model's own from other files.

    llama.cpp's converter prefers `chat_template` in tokenizer_config.json, and transformers rejects chat_template.json beside
    further templates. Templates with other names stay.
    """
    companions.changed[TEMPLATE] = template
    companions.copied.pop("chat_template.json", None)
    for name in ("tokenizer_config.json", "processor_config.json"):
        if name not in companions.copied:
            continue
        data = _config(companions, name)
        if not isinstance(data, dict) or "chat_template" not in data:
            continue
        original = data.pop("chat_template")
        for entry in original if isinstance(original, list) else ():
            other, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            if isinstance(other, str) and isinstance(text, str) and other.isidentifier() and other != "default":
                companions.changed[f"additional_chat_templates/{other}.jinja"] = text
        companions.changed[name] = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
