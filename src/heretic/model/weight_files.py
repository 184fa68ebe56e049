"""Which files of a model's folder are the model: decided once, by transformers' own order.

transformers 5.23, `modeling_utils._get_resolved_checkpoint_files`: the file that config.json names in `transformers_weights`, then
`model.safetensors`, then its index; pickle files only where no safetensors file of these names is there. Loading is told the file
that was chosen here, and planning, identity, download and export see its tensors only.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic.errors import UserError, first_line, plain_line
from heretic.model.tensor_info import PICKLED, TensorInfo, missing_file, read_headers

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_SINGLE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"
# Written by FSDP and tensor parallelism; transformers takes such files before all others.
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
VARIANT = re.compile(r"model\.[\w-]+\.safetensors(\.index\.json)?")
MIB = 1 << 20
LARGEST = {".json": 1024 * MIB, ".jinja": 16 * MIB, ".py": 16 * MIB}  # bytes of files that are read whole
LARGEST_CONFIG = 64 * MIB
READ_WHOLE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".spm")
SAMPLES = 32  # tensors of which the first row is compared with those of a second copy


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model folder.

    Attributes:
        name: The file that transformers opens: one file of weights, or an index.
        files: The files of weights, sorted.
        unused: Names of other files of weights and indexes; no part of the model.
        rival: Of these the one that another program would take and that holds other tensors; empty without one.
    """

    name: str
    files: tuple[Path, ...]
    unused: tuple[str, ...] = ()
    rival: str = ""


def choose_weights(names: Collection[str], explicit: Any, allow_pickle: bool) -> str | None:
    """The name of the file that transformers opens, of those in a folder or repository; None where there is none.

    `explicit` is the entry `transformers_weights` of config.json.
    """
    if explicit is not None:
        return str(explicit)
    order = (SINGLE, INDEX, *((PICKLED_SINGLE, PICKLED_INDEX) if allow_pickle else ()))
    return next((name for name in order if name in names), None)


def local_weights(folder: Path, config: Mapping[str, Any], allow_pickle: bool) -> WeightFiles:
    """Choose the weights of a folder, with `config` as its config.json has it. Raises UserError."""
    require_regular_files(folder)
    _refuse_other_layouts(folder)
    names = [entry.name for entry in folder.iterdir()]
    chosen = choose_weights(names, explicit_name(config, folder), allow_pickle)
    if chosen is None:
        raise _no_weights(folder, names)
    if chosen not in names:
        raise missing_file(folder / chosen)
    files = shards_of(folder / chosen)
    used = {chosen, *(file.name for file in files)}
    unused = tuple(sorted(n for n in names if n not in used and n.endswith((".safetensors", ".index.json", *PICKLED))))
    return WeightFiles(chosen, tuple(files), unused, _rival(folder, chosen, files))


def explicit_name(config: Mapping[str, Any], folder: Path) -> str | None:
    """The entry `transformers_weights`, checked. Raises UserError."""
    name = config.get("transformers_weights")
    if name is None:
        return None
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise UserError(
            f"transformers_weights is {_spell(name)}, and should name a safetensors file or index in the model's folder.",
            code="invalid-config",
            where=f"{folder / 'config.json'}: transformers_weights",
            fix="correct the entry, or remove it",
        )
    return name


def shards_of(file: Path) -> list[Path]:
    """The files of weights that a file stands for: those that an index names, else the file itself. Raises UserError."""
    if not file.name.endswith(".index.json"):
        return [file]
    names = sorted(set(read_index(file).values()))
    for name in names:
        if not (file.parent / name).exists():
            raise missing_file(file.parent / name)
    return [file.parent / name for name in names]


def read_index(index: Path) -> dict[str, str]:
    """The file that an index names for each tensor. Raises UserError."""
    content = read_json(index, "damaged-index")
    table = content.get("weight_map")
    if not isinstance(table, dict) or not table or not isinstance(content.get("metadata"), dict):
        raise UserError(
            "The index of the weights lacks weight_map or metadata.",
            code="damaged-index",
            where=str(index),
            fix="download the model again",
        )
    suffixes = PICKLED if index.name == PICKLED_INDEX else (".safetensors",)
    for name in table.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffixes):
            raise UserError(
                f"The index names no file of weights in the model's folder, outside it perhaps: {_spell(name)}",
                code="damaged-index",
                where=str(index),
                fix="download the model again",
            )
    return table


def check_index(index: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise UserError where an index names a tensor that its file does not hold."""
    for name, file in read_index(index).items():
        held = tensors.get(name)
        if held is None or (held.file is not None and held.file.name != file):
            raise UserError(
                f"The index says that {plain_line(file)} holds {plain_line(name)[:100]}, and it does not.",
                code="index-mismatch",
                where=str(index),
                fix="download the model again; or delete the index if model.safetensors holds the whole model",
            )


def read_json(file: Path, code: str, largest: int = LARGEST[".json"]) -> dict[str, Any]:
    """The object that a JSON file of a model holds. Raises UserError with `code`."""
    fix = "download the model again"
    try:
        require_regular(file)
        if file.stat().st_size > largest:
            raise UserError(f"{file.name} is larger than {largest // MIB} MiB.", code=code, where=str(file), fix=fix)
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file.name} cannot be read: {first_line(error)[:200]}", code=code, where=str(file), fix=fix
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file.name} is not a JSON object.", code=code, where=str(file), fix=fix)
    return content


def require_regular(file: Path) -> None:
    """Raise UserError for what is no regular file, such as a named pipe or a device: reading it may never end."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise UserError(
            f"{file.name} leads to a file that is not there.",
            code="missing-file",
            where=str(file),
            fix="download the model again",
        ) from None
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be read: {error.strerror or error}.",
            code="unreadable-file",
            where=str(file),
            fix="check the file and its permissions",
        ) from None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "named pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise UserError(
            f"{file.name} is a {kind}, not a regular file.",
            code="not-a-regular-file",
            where=str(file),
            fix="replace it with the file of the model",
        )


def require_regular_files(folder: Path) -> None:
    """Raise UserError where a file of a model's folder that may be read is no regular file, or is far too large to be read."""
    weights = (".safetensors", *PICKLED)
    try:
        inner = folder / "additional_chat_templates"
        entries = [*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else ())]
    except OSError as error:
        raise UserError(
            f"The model's folder cannot be read: {error.strerror or error}.",
            code="unreadable-file",
            where=str(folder),
            fix="check its permissions",
        ) from None
    for entry in sorted(entries):
        if entry.suffix not in (*READ_WHOLE, *weights) or entry.name.startswith("."):
            continue
        require_regular(entry)
        largest = LARGEST.get(entry.suffix)
        if largest is not None and entry.stat().st_size > largest:
            raise UserError(
                f"{entry.name} is larger than {largest // MIB} MiB.",
                code="file-too-large",
                where=str(entry),
                fix="download the model again",
            )


def _refuse_other_layouts(folder: Path) -> None:
    """Refuse folders from which transformers would load something else than the weights beside it. Raises UserError."""
    names = sorted(entry.name for entry in folder.iterdir())
    if ADAPTER in names:
        raise UserError(
            "The folder holds a model and an adapter, which transformers would put on the model.",
            code="adapter-beside-model",
            where=str(folder / ADAPTER),
            fix=f"merge the adapter into the model (peft: merge_and_unload), or copy the folder without {ADAPTER}",
        )
    if distributed := [name for name in names if DISTRIBUTED.fullmatch(name)]:
        raise UserError(
            "The folder holds a distributed checkpoint, which heretic does not read.",
            code="distributed-checkpoint",
            where=str(folder / distributed[0]),
            fix="save the model with save_pretrained, in ordinary shards",
        )


def _no_weights(folder: Path, names: Collection[str]) -> UserError:
    pickled = sorted(name for name in names if name.endswith(PICKLED) and name != "training_args.bin")
    variants = sorted(name for name in names if VARIANT.fullmatch(name) and name not in (SINGLE, INDEX))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    code, fix, which = "no-weights", "download the model again; its weights are missing", ""
    if variants:
        code, which = "weights-not-named-model", f", only {variants[0]}, which transformers reads for a variant only"
        fix = f"name the weights as transformers does: {SINGLE} or {INDEX}"
    elif others:
        code, which = "weights-not-named-model", f" that transformers would read, only {others[0]}"
        fix = f"name the weights as transformers does: {SINGLE}, or shards with {INDEX}"
        if others[0].startswith("adapter_"):
            fix = "name the model that the adapter was made for, or merge the adapter into it"
    elif pickled:
        code, which = "pickled-weights", f", only {pickled[0]}, which could run code when loaded"
        fix = "convert the weights to safetensors; or allow_pickle = true, which reads tensors and nothing else"
    return UserError(f"{folder} has no .safetensors weights{which}.", code=code, where=str(folder), fix=fix)


def _rival(folder: Path, chosen: str, files: Collection[Path]) -> str:
    """An index beside the chosen file that stands for other weights than it."""
    index = folder / INDEX
    if chosen == INDEX or not chosen.endswith(".safetensors") or not index.exists():
        return ""
    try:
        others = read_headers(shards_of(index))
        mine = read_headers(files)
    except UserError:  # an index without its shards stands for nothing
        return INDEX
    same = {n: (t.shape, t.dtype) for n, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in others.items()}
    return "" if same and all(_same_start(mine[n], others[n]) for n in _samples(sorted(mine))) else INDEX


def _samples(names: list[str]) -> list[str]:
    return names[:: max(1, len(names) // SAMPLES)]


def _same_start(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether the first rows of two tensors of one shape are the same."""
    import torch
    from safetensors import safe_open

    if one.file is None or other.file is None or not one.shape or not one.elements:
        return True
    with safe_open(one.file, framework="pt") as a, safe_open(other.file, framework="pt") as b:
        rows = [opened.get_slice(one.name)[:1].contiguous().view(torch.uint8) for opened in (a, b)]
    return torch.equal(*rows)


def _spell(value: Any) -> str:
    text = plain_line(repr(value))
    return text if len(text) <= 80 else f"{text[:80]}…"
