"""Writing an ablated model: shard by shard from the original checkpoint's tensors, never from what was loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from heretic.ablation.bake import bake_bias, bake_weight, rewrite, sources
from heretic.ablation.operator import Operator
from heretic.errors import UserError
from heretic.export.manifest import MANIFEST
from heretic.files import sha256, sort_metadata
from heretic.model.anatomy import Writer
from heretic.model.checkpoint import PICKLED, Checkpoint
from heretic.model.loading import LanguageModel
from heretic.progress import Watcher
from heretic.stop import Stop

TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
LEFT_OUT = {"README.md", MANIFEST, ".gitattributes", "heretic_source.json"}


@dataclass(frozen=True)
class TensorEdit:
    """What is done to one tensor of the checkpoint."""

    operator: Operator
    is_bias: bool
    transposed: bool

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The edited tensor, in the type of the given one."""
        if self.is_bias:
            return bake_bias(self.operator, tensor)
        return bake_weight(self.operator, tensor, transposed=self.transposed)


def plan_edits(
    checkpoint: Checkpoint, writers: tuple[Writer, ...], operators: Mapping[str, Operator], model: Any
) -> dict[str, TensorEdit]:
    """Edits by the name of the checkpoint's tensor; empty for a GGUF file, whose tensors have other names.

    Raises UserError if a writer's tensor cannot be found in the checkpoint.
    """
    if checkpoint.gguf_file:
        return {}
    edited = [w for w in writers if w.name in operators]
    edits = {}
    found = sources(checkpoint, edited, model)
    for writer in edited:
        for part in writer.parts:
            stored = found[part.name]
            edit = TensorEdit(operators[writer.name], part.is_bias, part.transposed != stored.turned)
            edits.update(dict.fromkeys(stored.names, edit))
    return edits


def check_destination(destination: Path, owner: str) -> None:
    """Raise UserError if the destination holds something that is not an earlier export of the run `owner`."""
    if not destination.expanduser().resolve().name:
        raise UserError("The destination is not a folder of its own.", where=str(destination))
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    manifest = destination / MANIFEST
    if not manifest.is_file() or f'"run": "{owner}"' not in manifest.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            "The destination exists and was not written by this run, so it is left as it is.",
            where=str(destination),
            fix="name another folder, or move this one away",
        )


def partial_folder(destination: Path) -> Path:
    """A new, empty folder beside the destination; leftovers of a killed process are removed."""
    for old in destination.parent.glob(f".{destination.name}.partial-*"):
        process = old.name.rpartition("-")[2]
        if not (process.isdigit() and psutil.pid_exists(int(process))):
            shutil.rmtree(old, ignore_errors=True)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"The destination cannot be written: {error.strerror or error}", where=str(destination)
        ) from None
    return partial


def write_weights(
    checkpoint: Checkpoint, edits: Mapping[str, TensorEdit], partial: Path, watcher: Watcher, stop: Stop
) -> dict[str, dict[str, str]]:
    """Write all shards with the edits made, and every other file of the checkpoint; returns hashes of what was read, written
    and copied.

    One shard is in memory at a time. Raises OSError or SafetensorError when the disk is full, Interrupted between shards.
    """
    hashes: dict[str, dict[str, str]] = {"source": {}, "written": {}, "copied": {}}
    remaining = set(edits)
    shards = checkpoint.shards()
    with watcher.stage("Writing the model", len(shards)) as stage:
        for shard in shards:
            stop.check()
            with safe_open(shard, framework="pt") as file:
                metadata = file.metadata() or {"format": "pt"}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name in remaining & set(tensors):
                tensors[name] = edits[name](tensors[name])
            remaining -= set(tensors)
            target = partial / shard.name
            save_file(tensors, target, metadata=metadata)
            sort_metadata(target)
            readable(target)
            hashes["source"][shard.name] = sha256(shard)
            hashes["written"][shard.name] = sha256(target)
            stage.advance()
    for name, file in copied_files(checkpoint.folder).items():
        shutil.copyfile(file, partial / name)
        hashes["copied"][name] = sha256(partial / name)
    assert not remaining, f"edits of tensors that no shard holds: {sorted(remaining)[:3]}"
    return hashes


def write_dequantised(
    checkpoint: Checkpoint,
    writers: tuple[Writer, ...],
    operators: Mapping[str, Operator],
    language_model: LanguageModel,
    partial: Path,
) -> dict[str, dict[str, str]]:
    """Write a model that was read from a GGUF file as an ordinary bfloat16 folder: its dequantised weights are all there is."""
    from huggingface_hub import save_torch_state_dict

    model: Any = language_model.model
    # No originals are needed: the model is given up after this.
    with rewrite(writers, operators, original=lambda name: dict(model.named_parameters())[name]):
        state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_torch_state_dict(state, partial, shared_tensors_to_discard=list(model._tied_weights_keys or []))
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(partial)
    language_model.tokenizer.save_pretrained(partial)
    source = checkpoint.folder / str(checkpoint.gguf_file)
    for path in partial.glob("*.safetensors"):
        readable(path)
    written = {path.name: sha256(path) for path in sorted(partial.glob("*.safetensors"))}
    return {"source": {source.name: sha256(source)}, "written": written, "copied": {}}


def readable(path: Path) -> None:
    """Give a file the permissions that any other new file has; safetensors makes its files readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def settle(partial: Path, destination: Path) -> None:
    """Put the finished folder in its place; an earlier export of the same run gives way only now."""
    old = None
    if destination.exists():
        old = destination.with_name(f".{destination.name}.partial-old-{os.getpid()}")
        destination.rename(old)
    partial.rename(destination)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def disk_error(error: Exception, partial: Path) -> UserError:
    """A failed write in words."""
    return UserError(
        f"The model cannot be written: {error}",
        where=str(partial.parent),
        fix="make room, then run the same command again or heretic export; the study is complete and kept",
    )


def keep_terms(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the base model's licence and notices where the format has not: its terms go with what is made of it."""
    for name, file in copied_files(checkpoint.folder).items():
        if name.upper().startswith(TERMS) and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def copied_files(folder: Path) -> dict[str, Path]:
    """Config, tokenizer, templates, licence, by name: every small file that is no weight in any format."""
    weights = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", *PICKLED)
    return {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in LEFT_OUT and not file.name.startswith(".") and file.suffix not in weights
    }
