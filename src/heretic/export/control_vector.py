"""Export the layers' directions for other programs: as safetensors, or as control vectors in GGUF.

A control vector holds `direction.N` [width] in float32 for the output of block N >= 1: llama.cpp (`llama-adapter.cpp`) has no
block 0, and one direction a block. repeng reads the same file (`ControlVector.import_gguf`), with the model's type. The directions
point towards refusal: a negative strength reduces refusals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote

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
    """Write a run's directions to a new file, or to several if the format holds one direction a layer.

    Args:
        folder: Of the run.
        settings: Of the run.
        path: The file to write.
        form: The format; if empty, the file's extension.

    Returns:
        The written files.

    Raises:
        UserError: Unknown format, no directions, a damaged file, or a file that exists.
    """
    formats = ", ".join(FORMS)
    form = form or path.suffix.removeprefix(".")
    if not form:
        raise UserError(
            "The file name has no extension that names a format.",
            code="unknown-format",
            where=f"--output {path}",
            fix=f"pass --format with one of: {formats}",
        )
    if form not in FORMS:
        raise UserError(
            f"Unknown format for directions: {form!r}.",
            code="unknown-format",
            where="--format",
            fix=f"use one of: {formats}",
        )
    source = folder.path / "directions.safetensors"
    if not source.is_file():
        raise UserError(
            "The run has no directions yet.",
            code="no-directions",
            where=str(folder.path),
            fix=f"continue the run: heretic run {quote(str(folder.path))}",
        )
    tensors, metadata = read_tensors(source)
    try:
        directions = directions_from_tensors(tensors)
    except ValueError as error:
        raise UserError(
            f"{source.name} is damaged: {error}.",
            code="damaged-file",
            where=str(source),
            fix=f"delete it, then recompute the directions: heretic run {quote(str(folder.path))}",
        ) from None
    paths = _output_paths(path, directions.count if form in ONE_A_LAYER else 1)
    FORMS[form](paths, directions, settings, metadata.get("fingerprint", ""))
    return paths


def _output_paths(path: Path, count: int) -> tuple[Path, ...]:
    """FILE.gguf, or FILE-1.gguf, FILE-2.gguf and so on. Raises UserError if one exists."""
    path = ensure_parent(path)
    names = [path.name] if count == 1 else [f"{path.stem}-{n}{path.suffix}" for n in range(1, count + 1)]
    for candidate in (path.with_name(name) for name in names):
        if candidate.exists():
            raise UserError(
                "The file exists, so heretic does not overwrite it.",
                code="file-exists",
                where=str(candidate),
                fix="choose another file name",
            )
    return tuple(path.with_name(name) for name in names)


def _safetensors(paths: Sequence[Path], directions: Directions, settings: Settings, stamp: str) -> None:
    write_directions(paths[0], directions, stamp, {"model": settings.model})


def _control_vectors(paths: Sequence[Path], directions: Directions, settings: Settings, _stamp: str) -> None:
    checkpoint = open_model(settings, download_weights=False)
    for number, path in enumerate(paths):
        _control_vector(path, directions.all_directions[:, number], checkpoint.text_config.model_type)


def _control_vector(path: Path, directions: Tensor, model_type: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions) - 1)
        for layer, direction in enumerate(directions.float().contiguous().numpy()[1:], start=1):
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


FORMS: dict[str, Callable[[Sequence[Path], Directions, Settings, str], None]] = {
    "safetensors": _safetensors,
    "gguf": _control_vectors,
}
ONE_A_LAYER = {"gguf"}  # formats with one direction a layer
