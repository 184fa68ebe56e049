"""Download a hub model to the local cache: its small files, then only the weights that transformers opens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from heretic.errors import UserError, cache_error, first_line, plain_line
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

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
NETWORK_VARIABLES = ("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", *CERTIFICATE_VARIABLES)


def fetch_files(model: str, revision: str, patterns: Sequence[str]) -> Path:
    """Download the files that match the patterns; returns the snapshot folder. Raises UserError."""
    from huggingface_hub import snapshot_download

    with _hub_errors(model, revision):
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(patterns)))


def fetch_small_files(model: str, revision: str) -> Path:
    """Download everything but the weights; returns the snapshot folder, named after the commit. Raises UserError."""
    return fetch_files(model, revision, DOWNLOADED)


def fetch_weights(model: str, folder: Path, config: Mapping[str, Any], allow_pickle: bool) -> None:
    """Download the weights that `choose_weights` selects; offline, use the cached ones. Raises UserError."""
    from huggingface_hub import snapshot_download

    chosen = choose_weights(_repository_files(model, folder)[0], explicit_name(config, folder), allow_pickle)
    if chosen is None:
        return  # opening the folder raises the error
    with _hub_errors(model):
        snapshot_download(model, revision=folder.name, allow_patterns=[escape(chosen)])
    if not chosen.endswith(".index.json") or not (folder / chosen).exists():
        return
    shards = sorted(set(read_index(folder / chosen).values()))
    with _hub_errors(model):
        snapshot_download(model, revision=folder.name, allow_patterns=[escape(shard) for shard in shards])


def fetch_headers(
    model: str, folder: Path, config: Mapping[str, Any], allow_pickle: bool
) -> tuple[dict[str, TensorInfo], tuple[str, ...]] | None:
    """Fetch the tensor headers and the names of the files of weights on the hub; None if the weights are cached.

    Raises UserError.
    """
    from huggingface_hub import HfApi

    explicit = explicit_name(config, folder)
    cached = choose_weights([entry.name for entry in folder.iterdir()], explicit, allow_pickle)
    names, online = _repository_files(model, folder)
    chosen = choose_weights(names, explicit, allow_pickle)
    if not online:
        return None
    if chosen is None or chosen in (PICKLED_SINGLE, PICKLED_INDEX):
        raise _without_safetensors(model, names, allow_pickle)
    if cached == chosen and (folder / chosen).exists():
        with contextlib.suppress(UserError):
            shards = set(read_index(folder / chosen).values()) if chosen.endswith(".index.json") else set()
            if all((folder / shard).exists() for shard in shards):
                return None
    api = HfApi()
    with _hub_errors(model):
        if chosen in (SINGLE, INDEX):
            files = api.get_safetensors_metadata(model, revision=folder.name).files_metadata
        else:
            shards = set(read_index(folder / chosen).values()) if chosen.endswith(".index.json") else {chosen}
            files = {s: api.parse_safetensors_file_metadata(model, s, revision=folder.name) for s in sorted(shards)}
    tensors = {
        name: TensorInfo(name, tuple(info.shape), info.dtype, None)
        for file in files.values()
        for name, info in file.tensors.items()
    }
    return tensors, tuple(files)


def _without_safetensors(model: str, names: list[str], allow_pickle: bool) -> UserError:
    fix = "choose a model with safetensors; or set allow_pickle = true if it has pickle files from a source you trust"
    if allow_pickle:
        fix = f"download the pickle files first, since only then their sizes are known: hf download {model}"
    others = sorted(name for name in names if name.endswith(".safetensors"))
    more = f", only {others[0]}" if others else ""
    return UserError(f"{model} has no safetensors weights on the hub{more}.", code="no-weights", fix=fix)


def _repository_files(model: str, folder: Path) -> tuple[list[str], bool]:
    """The files of the repository on the hub, or offline of the cache, and whether the hub answered."""
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        # A later download raises the error.
        with contextlib.suppress(Exception):
            return list(HfApi().list_repo_files(model, revision=folder.name)), True
    return [entry.name for entry in folder.iterdir()], False


@contextmanager
def _hub_errors(model: str, revision: str = "") -> Iterator[None]:
    """Turn errors of the hub's library into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library and the network raise many types
        from huggingface_hub import constants

        if disk := cache_error(error, {}):
            raise disk from None
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{model} is not a local folder and not in the hub's cache{f' at {revision}' if revision else ''}.",
                code="hub-unreachable",
                where="HF_HUB_OFFLINE in the environment",
                fix="check the name; unset HF_HUB_OFFLINE, or download the model first: "
                + " ".join(["hf download", quote(model), *(["--revision", quote(revision)] if revision else [])]),
            ) from None
        raise UserError(
            f"{model} is not a local folder and cannot be downloaded from the Hugging Face hub: {first_line(error)[:200]}",
            code="hub-unreachable",
            where=_environment(_status(hub_answer(error))),
            fix=_advice(error, model),
        ) from None


def _environment(status: int) -> str | None:
    """Name the environment variables that led the hub's library elsewhere; their values may hold passwords.

    An answer with a status has passed proxies and certificates.
    """
    variables = ("HF_ENDPOINT",) if status else NETWORK_VARIABLES
    found = [name for name in variables if os.environ.get(name) or os.environ.get(name.lower())]
    return f"{', '.join(found)} in the environment" if found else None


def hub_answer(error: BaseException | None) -> HfHubHTTPError | None:
    """Return the hub's own answer, if an error comes from one, however far behind."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _status(answer: HfHubHTTPError | None) -> int:
    """Return the HTTP status of an answer; 0 without one."""
    return answer.response.status_code if answer is not None and answer.response is not None else 0


def _advice(error: Exception, model: str) -> str:
    """Say what to do after an error of the hub."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError

    found = hub_answer(error)
    status = _status(found)
    if isinstance(found, DisabledRepoError):
        return "use another model: the hub has disabled this one"
    if isinstance(found, GatedRepoError) or status == 403:
        return (
            f"request access at https://huggingface.co/{model}, and log in with a token that may read it: hf auth login"
        )
    if isinstance(found, RepositoryNotFoundError) or status in (401, 404):
        return "check the name; for private models: hf auth login, or renew the token in HF_TOKEN"
    if status >= 429:
        return "try again later"
    for name in CERTIFICATE_VARIABLES:
        places = os.environ.get(name, "").split(os.pathsep)
        if places != [""] and not any(Path(place).exists() for place in places):
            return f"correct or unset {name}: {plain_line(os.environ[name])} does not exist"
        if name == "SSL_CERT_FILE" and Path(places[0] or "-").is_dir():
            return f"correct or unset {name}: {plain_line(os.environ[name])} is a folder"
    if isinstance(error, OSError) and error.filename:
        return f"check {plain_line(str(error.filename))} and its permissions"
    return "check the name and the network"
