"""A model on disk or on the hub: its config, and the names, shapes and places of its tensors, without loading weights.

Only safetensors and GGUF files are read. One that needs Python's pickle is refused unless that is allowed, and then read by
PyTorch's reader that makes nothing but tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic.errors import UserError, first_line
from heretic.files import expanded
from heretic.model import repository
from heretic.model.tensor_info import OPENED, PACKED_BY, SCALES, TensorInfo, packed_bits

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I8": "int8",
    "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DOWNLOADED = [*repository.DOWNLOADED, "*.safetensors"]
# A second copy of the weights in another layout, which some repositories carry beside the one that transformers reads.
IGNORED = ["consolidated*", "*/*.safetensors"]
# Small files that decide what the model says, besides its weights.
DECISIVE = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been looked at but not loaded; `adapter` is a folder with a LoRA adapter to put on it, `called` a
    name to use in place of the one that follows from the model's."""

    model: str
    folder: Path
    config: PretrainedConfig
    tensors: dict[str, TensorInfo] = field(repr=False)
    gguf_file: str | None = None
    commit: str | None = None
    adapter: Path | None = None
    called: str = ""

    @property
    def nbytes(self) -> int:
        """Size of all tensors as stored, in bytes."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors; of quantised ones those that are packed in them, without their scales."""
        packed, bits = PACKED_BY.get(self.quantised_by or ""), packed_bits(self.config)
        numbers = (t for name, t in self.tensors.items() if not self.quantised_by or not name.endswith(SCALES))
        return sum(t.elements if t.dtype != packed else 8 * t.nbytes // bits for t in numbers)

    @property
    def text_config(self) -> PretrainedConfig:
        """The config of the language part (the config itself unless the model also sees or hears)."""
        return self.config.get_text_config(decoder=True)

    @property
    def short_name(self) -> str:
        """Last part of the model's name, usable in a file name."""
        name = self.called or (
            Path(self.gguf_file).stem
            if self.gguf_file
            else Path(self.model).resolve().name
            if self.is_local
            else self.model
        )
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in name.rpartition("/")[2]).strip("-.") or "model"

    @property
    def is_local(self) -> bool:
        """Whether the user named a folder or file rather than a model on the hub."""
        return self.commit is None

    def shards(self) -> list[Path]:
        """The safetensors files, in order of their names."""
        return sorted({t.file for t in self.tensors.values() if t.file is not None})

    @property
    def largest_file(self) -> int:
        """Bytes of the largest of the shards that are here."""
        return max((file.stat().st_size for file in self.shards() if file.is_file()), default=0)

    @property
    def pickled(self) -> bool:
        """Whether the weights are in pickle files."""
        return any(file.suffix in PICKLED for file in self.shards())

    @property
    def quantised_by(self) -> str | None:
        """The method by which the checkpoint's own tensors are quantised ("fp8", "bitsandbytes", ...); None where they are not."""
        found = getattr(self.config, "quantization_config", None)
        if found is None or self.gguf_file:
            return None
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        return str(getattr(method, "value", method) or "an unnamed method")

    @property
    def opened(self) -> str | None:
        """What the weights are unpacked from while they are loaded, in words; None where they are stored as they are computed with,
        or stay packed."""
        return "GGUF" if self.gguf_file else OPENED.get(self.quantised_by or "")

    @property
    def own_code(self) -> bool:
        """Whether its config class is of its own Python code: it exists only where the user has trusted that."""
        return type(self.config).__module__.startswith("transformers_modules")

    def read(self, name: str) -> torch.Tensor:
        """One tensor from its file, as stored."""
        from safetensors import safe_open

        file = self.tensors[name].file
        if file is not None and file.suffix in PICKLED:
            return pickled_tensors(file)[name].clone()
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    def slice_of(self, name: str) -> Any:
        """One tensor to be indexed: of a safetensors file only what is asked for is read."""
        from safetensors import safe_open

        file = self.tensors[name].file
        if file is not None and file.suffix in PICKLED:
            return pickled_tensors(file)[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(name)

    def identity(self) -> str:
        """A hash that changes when the weights or the config do: headers, sizes and samples of every file, not every byte."""
        digest = hashlib.sha256()
        files = [self.folder / self.gguf_file] if self.gguf_file else self.shards()
        for path in files:
            _sample(path, digest)
        config = self.folder / "config.json"
        if config.is_file() and not self.gguf_file:
            digest.update(json.dumps(json.loads(config.read_text()), sort_keys=True).encode())
        for name in DECISIVE:
            if (self.folder / name).is_file():
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()


def _sample(path: Path, digest: Any, block: int = 1 << 16, blocks: int = 64) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for i in range(blocks):
            file.seek(max(0, (size - block) * i // (blocks - 1)))
            digest.update(file.read(block))


def require_name(model: str) -> None:
    """Raise UserError where no model is named."""
    if not model:
        raise UserError("No model was named.", fix='heretic MODEL, or model = "..." in config.toml')


def open_checkpoint(
    model: str,
    revision: str = "",
    *,
    trust_remote_code: list[str] | None = None,
    allow_pickle: bool = False,
    download_weights: bool = True,
) -> Checkpoint:
    """Find a model and read its config and tensor headers.

    A local folder or .gguf file wins over a hub id of the same name. With `download_weights` a hub model is brought to the
    local cache in full; without, only its small files and the headers of its weights are fetched. Raises UserError.
    """
    require_name(model)
    path = expanded(model)
    trusted = model in (trust_remote_code or [])
    if path.suffix == ".gguf":
        return _open_gguf(model, path)
    if path.is_dir():
        repository.check_links(path)
        return Checkpoint(model, path, _config(path, model, trusted), _local_tensors(path, allow_pickle))
    if path.exists():
        raise UserError(
            f"{model} is a file, not a model.", fix="name the folder that holds config.json, or a .gguf file"
        )
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"There is no model folder {model}.", fix="check the path, or name a hub model as owner/name")
    folder, tensors = _from_hub(model, revision, download_weights, allow_pickle)
    return Checkpoint(model, folder, _config(folder, model, trusted), tensors, commit=folder.name)


def _config(folder: Path, model: str, trusted: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json, so it is no model folder.", where=str(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise UserError(
                f"{model} can only be loaded by running Python code that came with it.",
                where=str(file),
                fix=f'read that code, then: trust_remote_code = ["{model}"]',
            ) from None
        raise UserError(f"The model's config cannot be read: {first_line(error)}", where=str(file)) from None
    _require_decoder(config, file)
    return config


def _require_decoder(config: PretrainedConfig, file: Path) -> None:
    """Refuse what is not a decoder-only language model, before gigabytes are loaded."""
    names = config.architectures or []
    generates = [n for n in names if n.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))]
    if getattr(config, "is_encoder_decoder", False) or (names and not generates):
        raise UserError(
            f"{names[0] if names else config.model_type} is not a decoder-only language model.",
            where=str(file),
            fix="name a chat model whose architecture ends in ForCausalLM",
        )


def _local_tensors(folder: Path, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = _indexed(index)
    else:
        files = sorted(folder.glob("*.safetensors"))
        if (folder / "model.safetensors").is_file():
            files = [folder / "model.safetensors"]
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        if pickled and allow_pickle:
            return _pickled(folder)
        raise UserError(
            f"{folder} has no .safetensors weights"
            + (f", only {pickled[0]}, which could run code when loaded." if pickled else "."),
            where=str(folder),
            fix="convert the weights to safetensors; or allow_pickle = true, which reads tensors and nothing else"
            if pickled
            else "download the model again; its weights are missing",
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(_header(file))
    return tensors


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"The index of the weights cannot be read: {first_line(error)[:200]}", where=str(index)
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"The index names a file outside the model's folder: {name!r}", where=str(index))
    return [index.parent / name for name in names]


def _pickled(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of the pickle files that transformers would read."""
    index = folder / "pytorch_model.bin.index.json"
    files = _indexed(index) if index.is_file() else [folder / "pytorch_model.bin"]
    formats = {f"torch.{name}": short for short, name in TORCH_NAMES.items()}
    return {
        name: TensorInfo(name, tuple(tensor.shape), formats.get(str(tensor.dtype), "F32"), file)
        for file in files
        for name, tensor in pickled_tensors(file).items()
    }


def pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle file, by PyTorch's reader that makes nothing but tensors; their bytes stay in the file until they are
    used. Raises UserError for a file with anything else in it."""
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    except FileNotFoundError:
        raise UserError(
            f"A file of the weights is missing: {file.name}", where=str(file.parent), fix="download the model again"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, AttributeError) as error:
        raise UserError(
            f"{file.name} holds more than tensors, or is damaged; it is not read: {first_line(error)[:120]}",
            where=str(file),
            fix="convert the weights to safetensors on a machine where running the file's code does no harm",
        ) from None


def _header(file: Path) -> dict[str, TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            found = {}  # nothing but the header is read; PyTorch would map the file as if it were to write to it
            for name in opened.keys():  # noqa: SIM118  (the handle is not a mapping)
                piece = opened.get_slice(name)
                found[name] = TensorInfo(name, tuple(piece.get_shape()), str(piece.get_dtype()), file)
            return found
    except FileNotFoundError:
        raise UserError(
            f"A file of the weights is missing: {file.name}", where=str(file.parent), fix="download the model again"
        ) from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"A file of the weights is damaged: {first_line(error)}",
            where=str(file),
            fix="download the model again",
        ) from None


def _open_gguf(model: str, path: Path) -> Checkpoint:
    from transformers import AutoConfig

    if not path.is_file():
        raise UserError(f"There is no file {path}.", fix="check the path of the GGUF file")
    try:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        # Sizes as they are after loading: dequantised to 2 bytes.
        tensors = {
            t.name: TensorInfo(t.name, tuple(int(n) for n in reversed(t.shape.tolist())), "BF16", None)
            for t in reader.tensors
        }
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise UserError(f"The GGUF file cannot be read: {first_line(error)}", where=str(path)) from None
    return Checkpoint(model, path.parent, config, tensors, gguf_file=path.name)


def _from_hub(
    model: str, revision: str, download_weights: bool, allow_pickle: bool
) -> tuple[Path, dict[str, TensorInfo]]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    wanted = [p for p in DOWNLOADED if download_weights or p != "*.safetensors"]
    try:
        folder = Path(
            snapshot_download(model, revision=revision or None, allow_patterns=wanted, ignore_patterns=IGNORED)
        )
        if download_weights:
            with contextlib.suppress(UserError):  # it may have nothing else
                return folder, _local_tensors(folder, allow_pickle)
            if allow_pickle:
                snapshot_download(model, revision=revision or None, allow_patterns=["pytorch_model*.bin"])
            return folder, _local_tensors(folder, allow_pickle)
        with contextlib.suppress(UserError):  # not downloaded yet, or only in part
            return folder, _local_tensors(folder, allow_pickle)
        metadata = HfApi().get_safetensors_metadata(model, revision=revision or None)
    except NotASafetensorsRepoError:
        fix = "choose a model that has them; or allow_pickle = true, if it has pickle files and you trust who made them"
        if allow_pickle:
            fix = f"the sizes in pickle files are known only when they are here: hf download {model}"
        raise UserError(f"{model} has no safetensors weights on the hub.", fix=fix) from None
    except UserError:
        raise
    except Exception as error:  # the hub's library and the network below it raise many kinds
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = first_line(error)[:200]
        raise UserError(
            f"{model} is neither a local folder nor to be had from the Hugging Face hub{offline}: {reason}",
            fix="check the name and the network; for gated models: hf auth login",
        ) from None
    return folder, {
        name: TensorInfo(name, tuple(info.shape), info.dtype, None)
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }
