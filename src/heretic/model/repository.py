"""Classify the files of a model's folder by name, and check where their links lead.

The names are those that transformers reads (5.23: `utils/__init__.py`, `utils/hub.py`, `processing_utils.py` and the
`VOCAB_FILES_NAMES` of its tokenizers), those of older tokenizers with their own code, and common names of licenses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from heretic.errors import UserError

Kind = Literal["weights", "support", "terms", "code", "card", "other"]

CARD = "README.md"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
# Config, generation, tokenizer, processor and chat template.
SUPPORT = re.compile(
    r"(config|generation_config|(\w+_)?(pre)?processor_config|audio_tokenizer_config)\.json"
    r"|model\.safetensors\.index\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|tekken|chat_template)\.json"
    r"|((\w+_)?vocab([-_]\w+)?|merges|dict|encoder|emoji|normalizer|byte_maps|word_shape|word_pronunciation)\.(json|txt|bpe)"
    r"|bpe\.codes|prophetnet\.tokenizer|tokenizer\.model\.v\d+|[\w.-]+\.(model|spm|tiktoken|jinja)",
    re.IGNORECASE,
)
TERMS = re.compile(
    r"([\w -]*(LICEN[SC]E|许可)[\w -]*|(COPYING|NOTICE|TERMS|EULA|(ACCEPTABLE_)?USE_POLICY|THIRD_PARTY)[\w -]*)"
    r"(\.\d+)*(\.(md|txt|pdf|html|rst))?",
    re.IGNORECASE,
)
# Subfolders with files of the model: further templates, second tokenizers ("decoder_tokenizer"), licenses.
FOLDERS = re.compile(r"additional_chat_templates|(\w+_)?(tokenizer|processor)|licen[sc]es", re.IGNORECASE)
# Patterns for snapshot_download; "*" matches folders too. They cover more than an export copies.
DOWNLOADED = (
    "*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes", "*.tokenizer", "*.jinja", "*.py", "LICEN[SC]E*",
    "*Licen[sc]e*", "*licen[sc]e*", "COPYING*", "NOTICE*", "Notice*", "TERMS*", "EULA*", "USE_POLICY*", "ACCEPTABLE_USE*",
    "THIRD_PARTY*", CARD,
)  # fmt: skip


def kind_of(name: str) -> Kind:
    """Classify a file of a model's folder by its relative path, with slashes."""
    folder, _, base = name.rpartition("/")
    suffix = Path(base).suffix.lower()
    if base.startswith(".") or (folder and not FOLDERS.fullmatch(folder)):
        return "other"
    if suffix in WEIGHTS:
        return "weights"
    if SUPPORT.fullmatch(base):
        return "support"
    if base == CARD:
        return "other" if folder else "card"
    if suffix == ".py":
        return "other" if folder else "code"
    return "terms" if TERMS.fullmatch(base) or folder.lower() in ("licenses", "licences") else "other"


def names_in(folder: Path) -> Iterator[str]:
    """Yield the entries of a model's folder and of its relevant subfolders, sorted. Raises UserError."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and FOLDERS.fullmatch(entry.name):
            resolve_inside(folder, entry)
            yield from (f"{entry.name}/{inner.name}" for inner in sorted(entry.iterdir()))
        else:
            yield entry.name


def check_links(folder: Path) -> None:
    """Raise UserError if a file that is read or copied is a link to outside the folder."""
    for name in names_in(folder):
        if kind_of(name) != "other" and (folder / name).is_symlink():
            resolve_inside(folder, folder / name)


def resolve_inside(folder: Path, path: Path) -> Path:
    """Resolve the links of a file in a model's folder.

    Links may lead into the folder and, for a snapshot in the hub's cache, to the cache's blobs. Hard links cannot be detected.

    Raises:
        UserError: "link-outside-folder" for any other link.
    """
    target = Path(os.path.realpath(path))
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        repository = home.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]  # since hub 2.0 all repositories share blobs
    if any(target.is_relative_to(Path(os.path.realpath(root))) for root in allowed):
        return target
    raise UserError(
        f"{path.relative_to(folder)} is a link to a file outside the model's folder, so heretic does not follow it.",
        code="link-outside-folder",
        where=str(path),
        fix="replace the link with a copy of the file if the model needs it; otherwise delete the link",
    )
