"""The layers' directions as files for other programs: safetensors, or control vectors in GGUF.

A control vector holds `direction.N` [width] for the output of block N, in float32. llama.cpp adds it there, from block 1 on: it has
no place for block 0 (`llama-adapter.cpp`), nor for a second direction of a block, so several make as many files. repeng reads the
same file (`ControlVector.import_gguf`) and asks for the model's type besides. The directions point towards refusing, so that a
negative strength makes the model decline less.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
from torch import Tensor

from heretic.ablation.directions import Directions
from heretic.errors import UserError
from heretic.files import ensure_parent, read_tensors
from heretic.model.checkpoint import open_model
from heretic.runs.folder import RunFolder, write_directions
from heretic.runs.stored_tensors import directions_from_tensors
from heretic.settings import Settings

ARCHITECTURE = "controlvector"


def export_directions(folder: RunFolder, settings: Settings, path: Path, form: str) -> tuple[Path, ...]:
    """Write all of a run's directions to a new file, or to one for each direction of a layer where the format holds one a layer.

    An empty `form` is taken from the file's name. Returns what was written. Raises UserError.
    """
    known = ", ".join(FORMS)
    form = form or path.suffix.removeprefix(".")
    if not form:
        raise UserError(
            "The file name has no extension that names a format.",
            code="unknown-format",
            where=f"--output {path}",
            fix=f"pass --format with one of: {known}",
        )
    if form not in FORMS:
        raise UserError(
            f"Unknown format for directions: {form!r}.",
            code="unknown-format",
            where="--format",
            fix=f"use one of: {known}",
        )
    source = folder.path / "directions.safetensors"
    if not source.is_file():
        raise UserError(
            "The run has no directions yet.",
            code="no-directions",
            where=str(folder.path),
            fix=f"continue the run: heretic run {folder.path}",
        )
    tensors, metadata = read_tensors(source)
    try:
        directions = directions_from_tensors(tensors)
    except ValueError as error:
        raise UserError(
            f"{source.name} is damaged: {error}.",
            code="damaged-file",
            where=str(source),
            fix=f"delete it, then find them again: heretic run {folder.path}",
        ) from None
    places = _places(path, directions.count if form in ONE_A_LAYER else 1)
    FORMS[form](places, directions, settings, metadata.get("fingerprint", ""))
    return places


def _places(path: Path, count: int) -> tuple[Path, ...]:
    """FILE.gguf, or FILE-1.gguf, FILE-2.gguf and so on; none of them exists."""
    path = ensure_parent(path)
    names = [path.name] if count == 1 else [f"{path.stem}-{n}{path.suffix}" for n in range(1, count + 1)]
    for place in (path.with_name(name) for name in names):
        if place.exists():
            raise UserError(
                "The file exists, and heretic does not overwrite it.",
                code="file-exists",
                where=str(place),
                fix="name another file",
            )
    return tuple(path.with_name(name) for name in names)


def _safetensors(places: Sequence[Path], directions: Directions, settings: Settings, stamp: str) -> None:
    write_directions(places[0], directions, stamp, {"model": settings.model})


def _control_vectors(places: Sequence[Path], directions: Directions, settings: Settings, _stamp: str) -> None:
    checkpoint = open_model(settings, download_weights=False)
    for number, path in enumerate(places):
        _control_vector(path, directions.all_directions[:, number], checkpoint.text_config.model_type)


def _control_vector(path: Path, directions: Tensor, model_type: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(beside, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions) - 1)
        for layer, direction in enumerate(directions.float().contiguous().numpy()[1:], start=1):
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


FORMS: dict[str, Callable[[Sequence[Path], Directions, Settings, str], None]] = {
    "safetensors": _safetensors,
    "gguf": _control_vectors,
}
ONE_A_LAYER = {"gguf"}  # a file for each of a layer's directions
