"""A model of the Hugging Face hub in the local cache: its small files, then the weights that transformers would open, no others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from heretic.errors import UserError, first_line
from heretic.model.repository import DOWNLOADED
from heretic.model.tensor_info import TensorInfo
from heretic.model.weight_files import (
    INDEX,
    PICKLED_INDEX,
    PICKLED_SINGLE,
    SINGLE,
    choose_weights,
    explicit_name,
    read_index,
)


def fetch_small_files(model: str, revision: str) -> Path:
    """Bring everything but the weights to the cache; returns the folder, which is named for the commit. Raises UserError."""
    from huggingface_hub import snapshot_download

    with _reached(model):
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(DOWNLOADED)))


def fetch_weights(model: str, folder: Path, config: Mapping[str, Any], allow_pickle: bool) -> None:
    """Bring the weights to the cache that `choose_weights` names; without a connection what is there is taken. Raises UserError."""
    from huggingface_hub import snapshot_download

    chosen = choose_weights(_names(model, folder)[0], explicit_name(config, folder), allow_pickle)
    if chosen is None:
        return  # who opens the folder says what there is instead
    with _reached(model):
        snapshot_download(model, revision=folder.name, allow_patterns=[escape(chosen)])
    if not chosen.endswith(".index.json") or not (folder / chosen).exists():
        return
    shards = sorted(set(read_index(folder / chosen).values()))
    with _reached(model):
        snapshot_download(model, revision=folder.name, allow_patterns=[escape(shard) for shard in shards])


def fetch_headers(
    model: str, folder: Path, config: Mapping[str, Any], allow_pickle: bool
) -> dict[str, TensorInfo] | None:
    """The headers of weights that are not in the cache; None where they are there. Raises UserError."""
    from huggingface_hub import HfApi

    explicit = explicit_name(config, folder)
    here = choose_weights([entry.name for entry in folder.iterdir()], explicit, allow_pickle)
    names, asked = _names(model, folder)
    chosen = choose_weights(names, explicit, allow_pickle)
    if not asked:
        return None
    if chosen is None or chosen in (PICKLED_SINGLE, PICKLED_INDEX):
        raise _without_safetensors(model, names, allow_pickle)
    if here == chosen and (folder / chosen).exists():
        with contextlib.suppress(UserError):
            shards = set(read_index(folder / chosen).values()) if chosen.endswith(".index.json") else set()
            if all((folder / shard).exists() for shard in shards):
                return None
    api = HfApi()
    with _reached(model):
        if chosen in (SINGLE, INDEX):
            files = list(api.get_safetensors_metadata(model, revision=folder.name).files_metadata.values())
        else:
            shards = set(read_index(folder / chosen).values()) if chosen.endswith(".index.json") else {chosen}
            files = [api.parse_safetensors_file_metadata(model, s, revision=folder.name) for s in sorted(shards)]
    return {
        name: TensorInfo(name, tuple(info.shape), info.dtype, None)
        for file in files
        for name, info in file.tensors.items()
    }


def _without_safetensors(model: str, names: list[str], allow_pickle: bool) -> UserError:
    fix = "choose a model that has them; or allow_pickle = true, if it has pickle files and you trust who made them"
    if allow_pickle:
        fix = f"the sizes in pickle files are known only when they are here: hf download {model}"
    others = sorted(name for name in names if name.endswith(".safetensors"))
    more = f", only {others[0]}" if others else ""
    return UserError(f"{model} has no safetensors weights on the hub{more}.", code="no-weights", fix=fix)


def _names(model: str, folder: Path) -> tuple[list[str], bool]:
    """The files of the repository, and whether the hub was asked; where it cannot be, the files in the cache."""
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        # Who downloads from it next says that it cannot be reached.
        with contextlib.suppress(Exception):
            return list(HfApi().list_repo_files(model, revision=folder.name)), True
    return [entry.name for entry in folder.iterdir()], False


@contextmanager
def _reached(model: str) -> Iterator[None]:
    """Turn what the hub's library raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's library and the network below it raise many kinds
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"{model} is neither a local folder nor to be had from the Hugging Face hub{offline}: {first_line(error)[:200]}",
            code="hub-unreachable",
            fix="check the name and the network; for gated models: hf auth login",
        ) from None
