"""The layers' directions as a file for other programs: safetensors, or a control vector in GGUF.

A control vector holds `direction.N` [width] for the output of block N, in float32. llama.cpp adds it there, from block 1 on: it has
no place for block 0 (`llama-adapter.cpp`). repeng reads the same file (`ControlVector.import_gguf`) and asks for the model's type
besides. The directions point towards refusing, so that a negative strength makes the model decline less.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
from torch import Tensor

from heretic.errors import UserError
from heretic.files import read_tensors, write_tensors
from heretic.model.checkpoint import open_checkpoint
from heretic.run_folder import RunFolder
from heretic.settings import Settings

ARCHITECTURE = "controlvector"


def export_directions(folder: RunFolder, settings: Settings, path: Path, form: str) -> Path:
    """Write a run's directions to a new file; an empty `form` is taken from the file's name. Raises UserError."""
    form = form or path.suffix.removeprefix(".")
    if form not in FORMS:
        raise UserError(
            f"There is no format {form!r} for directions.", where="--format", fix=f"one of: {', '.join(FORMS)}"
        )
    path = path.expanduser()
    if path.exists():
        raise UserError("The file exists, so it is left as it is.", where=str(path), fix="name another file")
    source = folder.path / "directions.safetensors"
    if not source.is_file():
        raise UserError(
            "The run has found no directions yet.",
            where=str(folder.path),
            fix=f"go on with it: heretic run {folder.path}",
        )
    tensors, metadata = read_tensors(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    FORMS[form](path, tensors["directions"], settings, metadata.get("fingerprint", ""))
    return path


def _safetensors(path: Path, directions: Tensor, settings: Settings, stamp: str) -> None:
    told = {"layout": "row l: unit direction after block l", "model": settings.model, "fingerprint": stamp}
    write_tensors(path, {"directions": directions}, told)


def _control_vector(path: Path, directions: Tensor, settings: Settings, _stamp: str) -> None:
    checkpoint = open_checkpoint(
        settings.model, settings.revision, trust_remote_code=settings.trust_remote_code, download_weights=False
    )
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(beside, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", checkpoint.text_config.model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions) - 1)
        for layer, direction in enumerate(directions.float().numpy()[1:], start=1):
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


FORMS: dict[str, Callable[[Path, Tensor, Settings, str], None]] = {
    "safetensors": _safetensors,
    "gguf": _control_vector,
}
