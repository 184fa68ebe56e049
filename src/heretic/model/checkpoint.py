"""A model on disk or on the hub: its config, and the names, shapes and files of its tensors, without loading weights.

It reads safetensors and GGUF files. Pickle files need `allow_pickle`, and PyTorch's weights-only reader reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic.errors import UserError, first_line
from heretic.files import expand_user
from heretic.model.config_reading import check_sizes, forget_left_over_quantization, open_config, read_small_files
from heretic.model.hub_model import fetch_headers, fetch_small_files, fetch_weights
from heretic.model.repository import check_links
from heretic.model.tensor_info import (
    DEQUANTIZED,
    PACKED_BY,
    PICKLED,
    SCALES,
    TensorInfo,
    packed_bits,
    pickled_tensors,
    quantization_method,
    read_headers,
)
from heretic.model.weight_files import check_index, local_weights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from heretic.settings import Settings

# Small files that affect the model's answers.
DECISIVE = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
# A folder of the hub's cache: models--OWNER--NAME/snapshots/COMMIT.
CACHED = re.compile("models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read, but not its weights."""

    model: str
    folder: Path
    config: PretrainedConfig
    tensors: dict[str, TensorInfo] = field(repr=False)
    gguf_file: str | None = None
    commit: str | None = None
    adapter: Path | None = None  # folder of a LoRA adapter to load with it
    called: str = ""  # replaces the name derived from the model's
    weights_name: str = ""  # the file that transformers opens: one file of weights, or an index; empty for GGUF
    unused: tuple[str, ...] = ()  # files of weights and indexes that are not part of the model; no export holds them
    rival: str = ""  # the one of these that indexes other weights than the model's
    hub_files: tuple[str, ...] = ()  # the model's files of weights on the hub, unless all of them are in its cache
    # Method of a `quantization_config` without packed tensors; no export holds that entry.
    leftover_quantization: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors; packed ones are counted unpacked, without their scales."""
        packed, bits = PACKED_BY.get(self.quantized_by or "", ()), packed_bits(self.config)
        tensors = (t for name, t in self.tensors.items() if not self.quantized_by or not name.endswith(SCALES))
        return sum(t.elements if t.dtype not in packed else 8 * t.nbytes // bits for t in tensors)

    @property
    def text_config(self) -> PretrainedConfig:
        """The config of the language model (the config itself unless the model is multimodal)."""
        return self.config.get_text_config(decoder=True)

    @property
    def short_name(self) -> str:
        """Last part of the model's name, safe in a file name."""
        name = self.called or (
            Path(self.gguf_file).stem
            if self.gguf_file
            else self.on_hub[0]
            if self.on_hub
            else Path(self.model).resolve().name
        )
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in name.rpartition("/")[2]).strip("-.") or "model"

    @property
    def on_hub(self) -> tuple[str, str] | None:
        """The model's name and commit on the hub, also if a folder of the hub's cache was named; None for another folder."""
        if self.commit is not None:
            return self.model, self.commit
        found = CACHED.fullmatch("/".join(self.folder.absolute().parts[-3:])) if not self.gguf_file else None
        return (f"{found[1]}/{found[2]}", found[3]) if found else None

    @property
    def is_local(self) -> bool:
        """Whether the model is a local folder or file, not one on the hub."""
        return self.commit is None

    def shards(self) -> list[Path]:
        """Return the files of weights, sorted by name."""
        return sorted({t.file for t in self.tensors.values() if t.file is not None})

    @property
    def downloaded_bytes(self) -> int:
        """Bytes of the files in `hub_files` that an interrupted download has left complete in the hub's cache."""
        files = [self.folder / name for name in self.hub_files]
        return sum(file.stat().st_size for file in files if file.is_file())

    @property
    def largest_file(self) -> int:
        """Bytes of the largest local shard."""
        return max((file.stat().st_size for file in self.shards() if file.is_file()), default=0)

    @property
    def pickled(self) -> bool:
        """Whether the weights are in pickle files."""
        return any(file.suffix in PICKLED for file in self.shards())

    @property
    def quantized_by(self) -> str | None:
        """The quantization method of the checkpoint's tensors ("fp8", "bitsandbytes", ...); None if not quantized."""
        return None if self.gguf_file else quantization_method(self.config)

    @property
    def is_dequantized(self) -> str | None:
        """The format that loading dequantizes the weights from ("GGUF", "FP8", ...); None if it does not."""
        return "GGUF" if self.gguf_file else DEQUANTIZED.get(self.quantized_by or "")

    @property
    def obstacle(self) -> str | None:
        """What keeps its tensors from being read one by one as the model has them; None for safetensors in full precision."""
        stored = "GGUF" if self.gguf_file else "pickle files" if self.pickled else self.quantized_by
        return stored or ("an adapter" if self.adapter else None)

    @property
    def own_code(self) -> bool:
        """Whether its config class comes from its own Python code, which the user has trusted."""
        return type(self.config).__module__.startswith("transformers_modules")

    def config_text(self) -> str | None:
        """Return config.json without a leftover `quantization_config`, as an export holds it; None if unchanged."""
        if not self.leftover_quantization:
            return None
        raw = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return json.dumps(_without(raw, "quantization_config"), indent=2, ensure_ascii=False) + "\n"

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor from its file, as stored."""
        from safetensors import safe_open

        file = self.tensors[name].file
        if file is not None and file.suffix in PICKLED:
            return pickled_tensors(file)[name].clone()
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    def slice_of(self, name: str) -> Any:
        """Open one tensor for slicing; of a safetensors file only the slices are read."""
        from safetensors import safe_open

        file = self.tensors[name].file
        if file is not None and file.suffix in PICKLED:
            return pickled_tensors(file)[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(name)

    def identity(self) -> str:
        """Return a hash of config, headers, sizes and samples of every file; it does not cover every byte."""
        digest = hashlib.sha256()
        files = [self.folder / self.gguf_file] if self.gguf_file else self.shards()
        for path in files:
            _sample(path, digest)
        config = self.folder / "config.json"
        if config.is_file() and not self.gguf_file:
            digest.update(json.dumps(json.loads(config.read_text(encoding="utf-8")), sort_keys=True).encode())
        for name in DECISIVE:
            if (self.folder / name).is_file():
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()


def _without(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A config and its nested configs without one entry."""
    return {k: _without(v, key) if isinstance(v, dict) else v for k, v in config.items() if k != key}


def _sample(path: Path, digest: Any, block: int = 1 << 16, blocks: int = 64) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for i in range(blocks):
            file.seek(max(0, (size - block) * i // (blocks - 1)))
            digest.update(file.read(block))


def require_name(model: str) -> None:
    """Raise UserError if no model is named."""
    if not model:
        raise UserError("No model was named.", code="no-model", fix='heretic MODEL, or model = "..." in config.toml')


def open_checkpoint(
    model: str,
    revision: str = "",
    *,
    trust_remote_code: list[str] | None = None,
    allow_pickle: bool = False,
    download_weights: bool = True,
) -> Checkpoint:
    """Find a model and read its config and tensor headers. A local folder or .gguf file wins over a hub id of the same name.

    Args:
        model: A folder, a .gguf file, or owner/name on the hub.
        revision: Of the hub repository.
        trust_remote_code: Models whose own Python code may run.
        allow_pickle: Whether pickle files may be read.
        download_weights: Whether to download a hub model in full; else only its small files and tensor headers.

    Raises:
        UserError: The model is missing, damaged, or not allowed.
    """
    require_name(model)
    path = expand_user(model)
    trusted = model in (trust_remote_code or [])
    if path.suffix == ".gguf":
        return _open_gguf(model, path)
    if path.is_dir():
        check_links(path)
        return _open_folder(model, path, read_small_files(path), trusted, allow_pickle)
    if path.exists():
        raise UserError(
            f"{model} is a file, not a model.",
            code="not-a-model",
            fix="name the folder that holds config.json, or a .gguf file",
        )
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"Model folder {model} does not exist.",
            code="no-model-folder",
            fix="check the path, name a hub model as owner/name, or give a run the new folder with --set model=FOLDER",
        )
    folder = fetch_small_files(model, revision)
    check_links(folder)
    raw = read_small_files(folder)
    if download_weights:
        fetch_weights(model, folder, raw, allow_pickle)
    else:
        fetched = fetch_headers(model, folder, raw, allow_pickle)
        if fetched is not None:
            tensors, files = fetched
            config, leftover = _checked_config(model, folder, raw, tensors, trusted)
            return Checkpoint(
                model, folder, config, tensors, commit=folder.name, hub_files=files, leftover_quantization=leftover
            )
    return _open_folder(model, folder, raw, trusted, allow_pickle, commit=folder.name)


def open_model(settings: Settings, *, download_weights: bool = True) -> Checkpoint:
    """Open the checkpoint that the settings name; see `open_checkpoint`."""
    return open_checkpoint(
        settings.model,
        settings.revision,
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
        download_weights=download_weights,
    )


def _open_folder(
    model: str, folder: Path, raw: dict[str, Any], trusted: bool, allow_pickle: bool, commit: str | None = None
) -> Checkpoint:
    weights = local_weights(folder, raw, allow_pickle)
    tensors = read_headers(weights.files)
    if weights.name.endswith(".index.json"):
        check_index(folder / weights.name, tensors)
    config, leftover = _checked_config(model, folder, raw, tensors, trusted)
    return Checkpoint(
        model,
        folder,
        config,
        tensors,
        commit=commit,
        weights_name=weights.name,
        unused=weights.unused,
        rival=weights.rival,
        leftover_quantization=leftover,
    )


def _checked_config(
    model: str, folder: Path, raw: dict[str, Any], tensors: dict[str, TensorInfo], trusted: bool
) -> tuple[PretrainedConfig, str]:
    file = folder / "config.json"
    check_sizes(raw, tensors, file)
    config = open_config(folder, raw, model, trusted)
    return config, forget_left_over_quantization(config, tensors, file)


def _open_gguf(model: str, path: Path) -> Checkpoint:
    from transformers import AutoConfig

    if not path.is_file():
        raise UserError(f"File {path} does not exist.", code="no-gguf-file", fix="check the path of the GGUF file")
    try:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        # Sizes after loading: dequantized to 2 bytes.
        tensors = {
            t.name: TensorInfo(t.name, tuple(int(n) for n in reversed(t.shape.tolist())), "BF16", None)
            for t in reader.tensors
        }
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except MemoryError:
        raise
    except Exception as error:  # both packages trust the file's content, so any error may follow
        raise UserError(
            f"The GGUF file cannot be read: {first_line(error)[:200]}",
            code="damaged-gguf",
            where=str(path),
            fix="download the file again, or use the model as safetensors",
        ) from None
    return Checkpoint(model, path.parent, config, tensors, gguf_file=path.name)
