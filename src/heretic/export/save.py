"""Writing an ablated model: shard by shard from the original checkpoint's tensors, never from what was loaded."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from heretic.ablation.bake import bake_bias, bake_weight, rewritten_weights, sources
from heretic.ablation.operator import Operator
from heretic.errors import UserError
from heretic.export.companions import copy_companions, find_companions
from heretic.export.older_readers import for_older_readers
from heretic.files import sha256, write_text
from heretic.interrupt import StopSignal
from heretic.model.architecture import ResidualWriter
from heretic.model.checkpoint import Checkpoint
from heretic.model.loading import LanguageModel
from heretic.model.tensor_info import PICKLED, pickled_tensors
from heretic.progress import ProgressReporter

BLOCK = 1 << 24  # bytes copied at a time
WRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")  # by transformers
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


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
    checkpoint: Checkpoint, writers: tuple[ResidualWriter, ...], operators: Mapping[str, Operator], model: Any
) -> dict[str, TensorEdit]:
    """Edits by the name of the checkpoint's tensor.

    Raises UserError if a writer's tensor cannot be found in the checkpoint, or if it has no full-precision tensors.
    """
    if method := checkpoint.quantized_by:
        full = ' or "full" (in bfloat16)' if checkpoint.is_dequantized else ""
        raise UserError(
            f"{checkpoint.model} is quantized ({method}) and has no full-precision weights to edit.",
            code="export-format-not-supported",
            where="export_format",
            fix=f'set export_format = "lora"{full}; or run the study on the full-precision model',
        )
    edited = [w for w in writers if w.name in operators]
    edits = {}
    found = sources(checkpoint, edited, model)
    for writer in edited:
        for part in writer.parts:
            stored = found[part.name]
            edit = TensorEdit(operators[writer.name], part.is_bias, part.transposed != stored.transposed)
            edits.update(dict.fromkeys(stored.names, edit))
    return edits


def write_weights(
    checkpoint: Checkpoint,
    edits: Mapping[str, TensorEdit],
    partial: Path,
    reporter: ProgressReporter,
    stop: StopSignal,
    template: str = "",
) -> dict[str, dict[str, str]]:
    """Write all shards with the edits made, and what goes with them, with `template` in place of the model's own chat template.
    Returns hashes of what was read, written, copied and changed.

    One tensor is in memory at a time, however large the shard (a pickle file's are those of a whole shard). Raises OSError or
    SafetensorError when the disk is full, Interrupted between tensors.
    """
    hashes: dict[str, dict[str, str]] = {"source": {}, "written": {}}
    shards = checkpoint.shards()
    held = {t.name for t in checkpoint.tensors.values()}
    assert edits.keys() <= held, f"edits of tensors that no shard holds: {sorted(edits.keys() - held)[:3]}"
    with reporter.stage("Writing the model", len(shards)) as stage:
        for shard in shards:
            stop.check()
            if shard.suffix in PICKLED:
                target = partial / f"{shard.stem.replace('pytorch_model', 'model')}.safetensors"
                save_file(_unpickled(shard, edits), target, metadata={"format": "pt"})
            else:
                target = partial / shard.name
                stream_edited(shard, target, edits, stop)
            readable(target)
            hashes["source"][shard.name] = sha256(shard)
            hashes["written"][target.name] = sha256(target)
            stage.advance()
    if checkpoint.pickled and len(shards) > 1:
        _write_index(checkpoint, partial)
    text = checkpoint.config_text()
    beside = copy_companions(
        checkpoint.folder,
        partial,
        template=template,
        unused=checkpoint.unused,
        texts={} if text is None else {"config.json": text},
        reporter=reporter,
    )
    index = checkpoint.weights_name
    if index.endswith(".index.json") and not checkpoint.pickled and not (partial / index).exists():
        shutil.copyfile(checkpoint.folder / index, partial / index)  # one of another name, which config.json gives
        beside["copied"][index] = sha256(partial / index)
    return hashes | beside


def stream_edited(shard: Path, target: Path, edits: Mapping[str, TensorEdit], stop: StopSignal) -> None:
    """A copy of a safetensors file with tensors edited. An edit changes no shape and no number format, so the header stays as it
    is, and what is not edited is copied byte for byte."""
    with shard.open("rb") as source, target.open("wb") as copy, safe_open(shard, framework="pt") as tensors:
        length = source.read(8)
        header = source.read(int.from_bytes(length, "little"))
        copy.write(length + header)
        places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name, (start, end) in sorted(places.items(), key=lambda place: place[1]):
            stop.check()
            if name in edits:
                edited = edits[name](tensors.get_tensor(name)).contiguous()
                copy.write(edited.view(torch.uint8).numpy().data)
                source.seek(end - start, os.SEEK_CUR)
                continue
            for rest in range(end - start, 0, -BLOCK):
                copy.write(source.read(min(BLOCK, rest)))
        copy.flush()
        os.fsync(copy.fileno())


def _unpickled(shard: Path, edits: Mapping[str, TensorEdit]) -> dict[str, torch.Tensor]:
    """The tensors of a pickle file with edits made, none sharing memory with another, as safetensors wants them."""
    found = {name: tensor.contiguous() for name, tensor in pickled_tensors(shard).items()}
    places: set[int] = set()
    for name, tensor in found.items():
        found[name] = (
            edits[name](tensor) if name in edits else tensor.clone() if tensor.data_ptr() in places else tensor
        )
        places.add(tensor.data_ptr())
    return found


def _write_index(checkpoint: Checkpoint, partial: Path) -> None:
    """Which of several files holds which tensor, as transformers looks for it."""
    files = {
        name: f"{tensor.file.stem.replace('pytorch_model', 'model')}.safetensors"
        for name, tensor in checkpoint.tensors.items()
        if tensor.file is not None
    }
    index = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": files}
    write_text(partial / "model.safetensors.index.json", json.dumps(index, indent=2))


def write_dequantized(
    checkpoint: Checkpoint,
    writers: tuple[ResidualWriter, ...],
    operators: Mapping[str, Operator],
    language_model: LanguageModel,
    partial: Path,
    reporter: ProgressReporter,
    stop: StopSignal,
    template: str = "",
) -> dict[str, dict[str, str]]:
    """Write a model that was opened from a GGUF file or from a quantized checkpoint as an ordinary folder, in the number formats in
    which it is loaded: what was opened is all there is. Its weights have to be in RAM, all of them. Returns hashes like
    `write_weights`. Raises Interrupted."""
    model: Any = language_model.model
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    config.dtype = model.dtype
    with reporter.stage("Writing the model", None):
        # No originals are needed: the model is given up after this.
        parameters = dict(model.named_parameters())
        with rewritten_weights(writers, operators, original=parameters.__getitem__):
            state = dict(model.state_dict())
        # A model that was read from GGUF refuses to be saved, and an opened one would be saved under the names of packed tensors.
        with torch.device("meta"):
            plain = type(model)(config)
        plain.load_state_dict(state, assign=True)
        plain.tie_weights(missing_keys=set())  # a head of its own stays one, whatever the config says
        stored = checkpoint.folder / "generation_config.json"
        # transformers refuses to save some that it has read: the model's own file is copied.
        plain.generation_config = GenerationConfig() if _is_beside(stored, checkpoint) else model.generation_config
        stop.check()
        beside: dict[str, dict[str, str]] = {"copied": {}, "changed": {}}
        if checkpoint.gguf_file:
            source = [checkpoint.folder / checkpoint.gguf_file]
            language_model.tokenizer.save_pretrained(partial)
        else:
            source = [*checkpoint.shards(), *(p for name in WRITTEN[:2] if (p := checkpoint.folder / name).is_file())]
            beside = _copy_beside(checkpoint, language_model, partial, template, reporter)
        plain.save_pretrained(partial, max_shard_size="5GB")
        ahead = _warn_of_unread_tensors(checkpoint, reporter)
        for_older_readers(partial, None if checkpoint.gguf_file else checkpoint.folder, predicts_ahead=not ahead)
        for name, text in find_companions(partial).changed.items():
            write_text(partial / name, text)  # code that the config names and the base model's folder does not hold
        if _is_beside(stored, checkpoint):
            shutil.copyfile(stored, partial / stored.name)
        for path in partial.glob("*.safetensors"):
            readable(path)
        return {
            "source": hashed(source, stop),
            "written": hashed(sorted(partial.glob("*.safetensors")), stop),
            **beside,
        }


def _copy_beside(
    checkpoint: Checkpoint, language_model: LanguageModel, partial: Path, template: str, reporter: ProgressReporter
) -> dict[str, dict[str, str]]:
    """Copy what accompanies the weights of a dequantized model; of a composite one without its other parts."""
    if not is_language_model_alone(language_model.model.config, checkpoint):
        but: tuple[str, ...] = WRITTEN
        texts: dict[str, str] = {}
    else:
        but, texts = (*WRITTEN, *PROCESSOR_FILES), _named_tokenizer(checkpoint.folder, language_model.tokenizer)
        reporter.warning(
            f"The export is the language model of {checkpoint.model} alone: heretic does not read its other parts, such as "
            "the one for images, when it dequantizes."
        )
    return copy_companions(
        checkpoint.folder, partial, template=template, but=but, unused=checkpoint.unused, texts=texts, reporter=reporter
    )


def _named_tokenizer(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Return tokenizer_config.json with the base model's class, which transformers may choose by the `model_type` that changes."""
    file, name = folder / "tokenizer_config.json", type(tokenizer).__name__
    if not file.is_file() or name in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    return {file.name: json.dumps({**config, "tokenizer_class": name}, indent=2, ensure_ascii=False) + "\n"}


def is_language_model_alone(config: Any, checkpoint: Checkpoint) -> bool:
    """Whether transformers opened only the language model of a composite one."""
    return bool(checkpoint.config.get_text_config(decoder=True) is not checkpoint.config) and (
        config.model_type != checkpoint.config.model_type
    )


def _warn_of_unread_tensors(checkpoint: Checkpoint, reporter: ProgressReporter) -> bool:
    """Say that the layers for multi-token prediction are missing, which transformers does not load; return whether they are."""
    layers = getattr(checkpoint.config.get_text_config(decoder=True), "num_hidden_layers", None) or 1 << 30
    beyond = re.compile(r"(?:^|\.)mtp\.|^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")
    places = [(name, beyond.search(name)) for name in checkpoint.tensors]
    names = [name for name, found in places if found and (found[1] is None or int(found[1]) >= layers)]
    if names:
        reporter.warning(
            f"{len(names)} tensors for multi-token prediction are not in the export, such as {names[0]}: transformers does not "
            "load them. Speculative decoding with them needs the unquantized base model."
        )
    return bool(names)


def _is_beside(file: Path, checkpoint: Checkpoint) -> bool:
    return file.is_file() and not checkpoint.gguf_file


def hashed(files: Sequence[Path], stop: StopSignal) -> dict[str, str]:
    """SHA-256 by file name. Raises Interrupted between files."""
    found = {}
    for file in files:
        stop.check()
        found[file.name] = sha256(file)
    return found


def readable(path: Path) -> None:
    """Give a file the permissions that any other new file has; safetensors makes its files readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
