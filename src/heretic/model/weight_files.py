"""Select the weight files of a model's folder, once, in transformers' order.

transformers 5.23, `modeling_utils._get_resolved_checkpoint_files`: the file that config.json names in `transformers_weights`, then
`model.safetensors`, then its index, then pickle files. Loading, planning, download and export all use this selection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic.errors import UserError, first_line, plain_line, shortened
from heretic.files import open_regular
from heretic.model.tensor_info import PICKLED, TensorInfo, missing_file, read_headers

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_SINGLE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"
# Written by FSDP and tensor parallelism; transformers prefers such files to all others.
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
VARIANT = re.compile(r"model\.[\w-]+\.safetensors(\.index\.json)?")
WHAT = "The model's file"
MIB = 1 << 20
LARGEST = {".json": 1024 * MIB, ".jinja": 16 * MIB, ".py": 16 * MIB}  # bytes of files that are read into memory
LARGEST_CONFIG = 64 * MIB
READ_WHOLE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".spm")
SAMPLES = 32  # tensors whose first row is compared with that of a second copy


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model folder."""

    name: str  # the file that transformers opens: one file of weights, or an index
    files: tuple[Path, ...]  # the files of weights, sorted
    unused: tuple[str, ...] = ()  # other files of weights and indexes, which are not part of the model
    rival: str = ""  # the one of these that another program would load, with other tensors


def choose_weights(names: Collection[str], explicit: Any, allow_pickle: bool) -> str | None:
    """Return which of the files in a folder or repository transformers opens; None if none.

    Args:
        names: Names of the files.
        explicit: The entry `transformers_weights` of config.json.
        allow_pickle: Whether pickle files may be used.
    """
    if explicit is not None:
        return str(explicit)
    order = (SINGLE, INDEX, *((PICKLED_SINGLE, PICKLED_INDEX) if allow_pickle else ()))
    return next((name for name in order if name in names), None)


def local_weights(folder: Path, config: Mapping[str, Any], allow_pickle: bool) -> WeightFiles:
    """Select the weights of a folder; `config` is the content of config.json. Raises UserError."""
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
    """Return the entry `transformers_weights`, validated. Raises UserError."""
    name = config.get("transformers_weights")
    if name is None:
        return None
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise UserError(
            f"transformers_weights must name a safetensors file or index in the model's folder, not {shortened(repr(name))}.",
            code="invalid-config",
            where=f"{folder / 'config.json'}: transformers_weights",
            fix="correct the entry, or remove it",
        )
    return name


def shards_of(file: Path) -> list[Path]:
    """Return the files of weights that an index names, or the file itself. Raises UserError."""
    if not file.name.endswith(".index.json"):
        return [file]
    names = sorted(set(read_index(file).values()))
    for name in names:
        if not (file.parent / name).exists():
            raise missing_file(file.parent / name)
    return [file.parent / name for name in names]


def read_index(index: Path) -> dict[str, str]:
    """Read the file of each tensor from an index. Raises UserError."""
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
                f"The index names {shortened(repr(name))}, which is not a file of weights in the model's folder.",
                code="damaged-index",
                where=str(index),
                fix="download the model again",
            )
    return table


def check_index(index: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise UserError if an index names a tensor that its file does not hold."""
    for name, file in read_index(index).items():
        held = tensors.get(name)
        if held is None or (held.file is not None and held.file.name != file):
            raise UserError(
                f"The index names {plain_line(file)} for {plain_line(name)[:100]}, which that file does not hold.",
                code="index-mismatch",
                where=str(index),
                fix="download the model again; or delete the index if model.safetensors holds the whole model",
            )


def read_json(file: Path, code: str, largest: int = LARGEST[".json"]) -> dict[str, Any]:
    """Read the object in a JSON file of a model. Raises UserError with `code`."""
    fix = "download the model again"
    try:
        open_regular(file, WHAT).close()  # reading a named pipe or a device may never end
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


def require_regular_files(folder: Path) -> None:
    """Raise UserError if a file of a model's folder is not a regular file or is too large to read."""
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
        open_regular(entry, WHAT).close()
        largest = LARGEST.get(entry.suffix)
        if largest is not None and entry.stat().st_size > largest:
            raise UserError(
                f"{entry.name} is larger than {largest // MIB} MiB.",
                code="file-too-large",
                where=str(entry),
                fix="download the model again",
            )


def _refuse_other_layouts(folder: Path) -> None:
    """Raise UserError for folders from which transformers would load more than plain weights."""
    names = sorted(entry.name for entry in folder.iterdir())
    if ADAPTER in names:
        raise UserError(
            "The folder holds an adapter beside the model, and transformers would load both.",
            code="adapter-beside-model",
            where=str(folder / ADAPTER),
            fix=f"merge the adapter into the model (peft: merge_and_unload), or copy the folder without {ADAPTER}",
        )
    if distributed := [name for name in names if DISTRIBUTED.fullmatch(name)]:
        raise UserError(
            "The folder holds a distributed checkpoint, which heretic does not read.",
            code="distributed-checkpoint",
            where=str(folder / distributed[0]),
            fix="save the model with save_pretrained",
        )


def _no_weights(folder: Path, names: Collection[str]) -> UserError:
    pickled = sorted(name for name in names if name.endswith(PICKLED) and name != "training_args.bin")
    variants = sorted(name for name in names if VARIANT.fullmatch(name) and name not in (SINGLE, INDEX))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    code, fix, detail = "no-weights", "download the model again", ""
    if variants:
        code, detail = "weights-not-named-model", f", only {variants[0]}, which transformers reads only as a variant"
        fix = f"name the weights as transformers does: {SINGLE} or {INDEX}"
    elif others:
        code, detail = "weights-not-named-model", f" that transformers reads, only {others[0]}"
        fix = f"name the weights as transformers does: {SINGLE}, or shards with {INDEX}"
        if others[0].startswith("adapter_"):
            fix = "name the model that the adapter was made for, or merge the adapter into it"
    elif pickled:
        code, detail = "pickled-weights", f", only {pickled[0]}, which could run code when loaded"
        fix = "convert the weights to safetensors; or set allow_pickle = true, which reads tensors only"
    return UserError(f"{folder} has no .safetensors weights{detail}.", code=code, where=str(folder), fix=fix)


def _rival(folder: Path, chosen: str, files: Collection[Path]) -> str:
    """The index beside the selected file, if it names other weights."""
    index = folder / INDEX
    if chosen == INDEX or not chosen.endswith(".safetensors") or not index.exists():
        return ""
    try:
        indexed = read_headers(shards_of(index))
        selected = read_headers(files)
    except UserError:  # an index without its shards
        return INDEX
    same = {n: (t.shape, t.dtype) for n, t in selected.items()} == {n: (t.shape, t.dtype) for n, t in indexed.items()}
    return "" if same and all(_same_start(selected[n], indexed[n]) for n in _samples(sorted(selected))) else INDEX


def _samples(names: list[str]) -> list[str]:
    return names[:: max(1, len(names) // SAMPLES)]


def _same_start(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors of one shape have the same first row."""
    import torch
    from safetensors import safe_open

    if first.file is None or second.file is None or not first.shape or not first.elements:
        return True
    with safe_open(first.file, framework="pt") as a, safe_open(second.file, framework="pt") as b:
        rows = [file.get_slice(first.name)[:1].contiguous().view(torch.uint8) for file in (a, b)]
    return torch.equal(*rows)
