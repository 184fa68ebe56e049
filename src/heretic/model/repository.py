"""What the files of a model's folder are for, by their names, and where their links may lead.

The names are those that transformers reads (5.23: `utils/__init__.py`, `utils/hub.py`, `processing_utils.py` and the
`VOCAB_FILES_NAMES` of its tokenizers), those of older tokenizers with code of their own, and what licenses are called.
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
# Further templates, tokenizers beside the first one ("decoder_tokenizer"), licenses: the only folders that are looked into.
FOLDERS = re.compile(r"additional_chat_templates|(\w+_)?(tokenizer|processor)|licen[sc]es", re.IGNORECASE)
# As snapshot_download wants them; "*" stands for folders too. More than is copied: small files cost little, a missing one a model.
DOWNLOADED = (
    "*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes", "*.tokenizer", "*.jinja", "*.py", "LICEN[SC]E*",
    "*Licen[sc]e*", "*licen[sc]e*", "COPYING*", "NOTICE*", "Notice*", "TERMS*", "EULA*", "USE_POLICY*", "ACCEPTABLE_USE*",
    "THIRD_PARTY*", CARD,
)  # fmt: skip


def kind_of(name: str) -> Kind:
    """What a file of a model's folder is for; `name` is its path from there, with slashes."""
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
    """The entries of a model's folder and of those of its folders that may hold something for the model, sorted."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and FOLDERS.fullmatch(entry.name):
            resolve_inside(folder, entry)
            yield from (f"{entry.name}/{inner.name}" for inner in sorted(entry.iterdir()))
        else:
            yield entry.name


def check_links(folder: Path) -> None:
    """Refuse a model's folder in which a link leads out of it, under a name that is read or copied. Raises UserError."""
    for name in names_in(folder):
        if kind_of(name) != "other" and (folder / name).is_symlink():
            resolve_inside(folder, folder / name)


def resolve_inside(folder: Path, path: Path) -> Path:
    """Follow the links of a file in a model's folder.

    They may lead to files in the folder and, where the folder is a snapshot in the hub's cache, to the cache's blobs. A hard link
    cannot be told from a file.

    Raises:
        UserError: "link-outside-folder" for a link that leads anywhere else.
    """
    target = Path(os.path.realpath(path))
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        repository = home.parent.parent
        allowed += [
            repository / "blobs",
            repository.parent / "blobs",
        ]  # of this repository; shared by all, since hub 2.0
    if any(target.is_relative_to(Path(os.path.realpath(root))) for root in allowed):
        return target
    raise UserError(
        f"{path.relative_to(folder)} is a link to a file outside the model's folder, so heretic does not follow it.",
        code="link-outside-folder",
        where=str(path),
        fix="replace the link by a copy of the file if the model needs it; else delete the link",
    )
