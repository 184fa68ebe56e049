"""Looking at checkpoints without loading them, and refusing the bad ones."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import DisabledRepoError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from heretic.errors import UserError
from heretic.model.checkpoint import open_checkpoint
from heretic.model.hub_model import _advice, _hub_errors
from tests.helpers.errors import raises
from tests.tiny import save_tiny, tiny_model


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def refused(model: Path | str) -> str:
    with pytest.raises(UserError) as error:
        open_checkpoint(str(model))
    return str(error.value)


def code_of(model: Path | str, **options: bool) -> str:
    with pytest.raises(UserError) as error:
        open_checkpoint(str(model), **options)  # type: ignore[arg-type]
    assert str(error.value).count("\n") <= 2 and error.value.fix
    return error.value.code


def test_names_shapes_and_sizes_are_those_of_the_model(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    model = tiny_model("llama")
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {t.name: t.shape for t in checkpoint.tensors.values()} == expected
    assert checkpoint.parameters == sum(p.numel() for p in model.parameters())
    assert checkpoint.nbytes == 4 * checkpoint.parameters
    assert torch.equal(checkpoint.read("model.norm.weight"), model.model.norm.weight)
    assert checkpoint.short_name == "tiny-llama"


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    whole = open_checkpoint(str(save_tiny(tmp_path / "whole")))
    sharded = open_checkpoint(str(save_tiny(tmp_path / "sharded", max_shard_size="30KB")))
    assert len(sharded.shards()) > 2
    assert sharded.tensors.keys() == whole.tensors.keys()


def test_identity_changes_with_one_weight_and_not_with_the_place(copy: Path, llama: Path) -> None:
    before = open_checkpoint(str(llama)).identity()
    assert open_checkpoint(str(copy)).identity() == before
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert open_checkpoint(str(copy)).identity() != before


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, RepositoryNotFoundError, "hf auth login"),
        (403, GatedRepoError, "request access"),
        (401, GatedRepoError, "request access"),
        (403, DisabledRepoError, "disabled"),
        (404, RepositoryNotFoundError, "hf auth login"),
        (429, HfHubHTTPError, "later"),
    ],
)
def test_the_advice_after_an_error_of_the_hub_fits_its_status(
    status: int, kind: type[HfHubHTTPError], words: str
) -> None:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    error = kind("no", response=response)
    assert words in _advice(error, "owner/name")
    wrapped = OSError("not in the cache")
    wrapped.__cause__ = error
    assert words in _advice(wrapped, "owner/name") and "network" in _advice(OSError("no route"), "owner/name")


def test_bad_folders_are_refused_in_words(copy: Path, tmp_path: Path) -> None:
    assert code_of("") == "no-model"
    assert code_of(tmp_path / "nowhere") == "no-model-folder"
    assert code_of("someone/something") == "hub-unreachable"
    (tmp_path / "file").touch()
    assert code_of(tmp_path / "file") == "not-a-model"
    (tmp_path / "empty").mkdir()
    assert code_of(tmp_path / "empty") == "no-config"
    (copy / "config.json").write_text("{")
    assert code_of(copy) == "invalid-config"


def test_weights_that_need_pickle_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert code_of(copy) == "no-weights"
    (copy / "pytorch_model.bin").touch()
    assert code_of(copy) == "pickled-weights" and "allow_pickle = true" in refused(copy)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_pickle_files_are_read_only_when_allowed_and_only_for_their_tensors(copy: Path) -> None:
    before = open_checkpoint(str(copy))
    tensors = {name: before.read(name) for name in before.tensors}
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    found = open_checkpoint(str(copy), allow_pickle=True)
    assert found.pickled and {n: (t.shape, t.dtype) for n, t in found.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in before.tensors.items()
    }
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    torch.save({**tensors, "evil": Evil()}, copy / "pytorch_model.bin")
    with raises("unsafe-pickle"):
        open_checkpoint(str(copy), allow_pickle=True)
    assert not Path("ran").exists()


def test_damaged_and_missing_shards_are_named(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    assert code_of(copy) == "damaged-weights" and "model.safetensors" in refused(copy)
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}))
    assert code_of(copy) == "missing-shard" and "model-1.safetensors" in refused(copy)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../../etc/passwd"}}))
    assert code_of(copy) == "damaged-index"


def test_what_is_no_decoder_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (copy / "config.json").write_text(json.dumps(config))
    assert code_of(copy) == "not-a-causal-model"


def test_remote_code_is_not_run_unless_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config"}
    config["model_type"] = "evil"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
    assert code_of(copy) == "needs-remote-code"
    assert not (copy / "ran").exists()


def test_a_hub_model_is_taken_from_the_cache_and_a_partial_one_is_said_to_be(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stored = tmp_path / "hub" / "models--owner--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(llama, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    checkpoint = open_checkpoint("owner/tiny")
    assert (checkpoint.commit, checkpoint.short_name, checkpoint.is_local) == (commit, "tiny", False)
    assert checkpoint.identity() == open_checkpoint(str(llama)).identity()
    assert checkpoint.on_hub == ("owner/tiny", commit)
    by_folder = open_checkpoint(str(stored / "snapshots" / commit))
    assert (by_folder.on_hub, by_folder.short_name, by_folder.is_local) == (checkpoint.on_hub, "tiny", True)
    assert open_checkpoint(str(llama)).on_hub is None
    (stored / "snapshots" / commit / "model.safetensors").unlink()
    assert code_of("owner/tiny") == "no-weights"
    with raises("hub-unreachable") as error:
        open_checkpoint("owner/tiny", "v2")
    assert "HF_HUB_OFFLINE" in str(error.value.where) and "--revision v2" in str(error.value.fix)


def test_the_header_of_a_file_larger_than_memory_is_read(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    size = 2**41  # most of it a hole: no disk holds it
    header = json.dumps({"a.weight": {"dtype": "BF16", "shape": [2, size // 4], "data_offsets": [0, size]}}).encode()
    with (copy / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    found = open_checkpoint(str(copy)).tensors["a.weight"]
    assert (found.shape, found.dtype) == ((2, size // 4), "BF16")


def test_certificates_that_do_not_exist_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    assert "SSL_CERT_FILE" in _advice(FileNotFoundError(2, "No such file"), "owner/name")
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere:/etc")
    assert "SSL" not in _advice(OSError("no route"), "owner/name")
    monkeypatch.setenv("SSL_CERT_FILE", "/etc")
    assert "SSL_CERT_FILE" in _advice(IsADirectoryError(errno.EISDIR, "Is a directory"), "owner/name")
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "/t/token" in _advice(PermissionError(errno.EACCES, "Permission denied", "/t/token"), "owner/name")
    monkeypatch.setenv("https_proxy", "http://me:secret@127.0.0.1:9")
    with raises("hub-unreachable") as error:
        open_checkpoint("someone/something")
    assert "HTTPS_PROXY" in str(error.value.where) and "secret" not in str(error.value)


NO_SPACE = "No space left on device"
CACHED = f"{constants.HF_HUB_CACHE}/x.incomplete"
HOME = Path(constants.HF_HOME)


@pytest.mark.parametrize(
    ("error", "where", "variable"),
    [
        (OSError(errno.ENOSPC, NO_SPACE, CACHED), CACHED, "HF_HUB_CACHE"),
        (OSError(errno.ENOSPC, NO_SPACE), None, "HF_HUB_CACHE"),
        (PermissionError(errno.EACCES, "Permission denied", f"{HOME}/x"), f"{HOME}/x", "HF_HOME"),
    ],
)
def test_a_cache_that_cannot_be_written_is_no_network_problem(error: OSError, where: str | None, variable: str) -> None:
    with raises("disk") as told, _hub_errors("owner/name"):
        try:
            raise error
        except OSError as full:
            raise RuntimeError("the download failed") from full
    assert told.value.where == where and f"set {variable} to" in str(told.value.fix)


def test_a_folder_of_the_cache_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere/of/hub")
    with raises("disk"), _hub_errors("owner/name"):
        raise PermissionError(errno.EACCES, "Permission denied", "/nowhere/of")


@pytest.mark.parametrize(
    "error",
    [
        IsADirectoryError(errno.EISDIR, "Is a directory"),  # SSL_CERT_FILE
        IsADirectoryError(errno.EISDIR, "Is a directory", "/"),
        PermissionError(errno.EACCES, "Permission denied", constants.HF_TOKEN_PATH),
        PermissionError(errno.EACCES, "Permission denied", "/etc/certificates.pem"),
        PermissionError(errno.EACCES, "Permission denied"),  # a socket
    ],
)
def test_another_file_than_the_caches_is_no_full_disk(error: OSError) -> None:
    with raises("hub-unreachable"), _hub_errors("owner/name"):
        raise error


def test_only_the_models_own_files_in_the_cache_count_as_downloaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (copy / "model.safetensors").rename(copy / shards[0])
    tensors = open_checkpoint(str(save_tiny(copy.parent / "whole"))).tensors
    infos = {name: SimpleNamespace(shape=tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    (copy / "consolidated.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setattr("heretic.model.checkpoint.fetch_small_files", lambda *_: copy)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["model.safetensors.index.json"])
    monkeypatch.setattr(
        "huggingface_hub.HfApi.get_safetensors_metadata",
        lambda *_, **__: SimpleNamespace(files_metadata={name: SimpleNamespace(tensors=infos) for name in shards}),
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    checkpoint = open_checkpoint("owner/name", download_weights=False)
    assert checkpoint.downloaded_bytes == (copy / shards[0]).stat().st_size
