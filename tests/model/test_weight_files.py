"""Which files of a folder are the model: those that transformers opens, for every step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heretic.errors import UserError
from heretic.model.checkpoint import Checkpoint, open_checkpoint
from heretic.model.loading import load
from tests.tiny import save_tiny, tiny_model

PROBED = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than `llama`, in shards; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("shards") / "m", seed=1, max_shard_size="30KB")


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def code_of(folder: Path, **options: bool) -> str:
    with pytest.raises(UserError) as error:
        open_checkpoint(str(folder), **options)  # type: ignore[arg-type]
    assert str(error.value).count("\n") <= 2 and error.value.fix
    return error.value.code


def assert_like_transformers(checkpoint: Checkpoint) -> None:
    """The tensors that are planned with and exported are those that are loaded, by us and by transformers."""
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, use_safetensors=not checkpoint.pickled, dtype=torch.float32
    ).get_parameter(PROBED)
    ours = load(checkpoint, ["float32"], {"device_map": {"": "cpu"}}).model.get_parameter(PROBED)
    assert torch.equal(theirs, ours) and torch.equal(checkpoint.read(PROBED), theirs)


def test_single_file_wins_over_an_index_and_the_index_is_reported(folder: Path, shards: Path) -> None:
    for file in shards.glob("model*"):
        shutil.copy(file, folder)
    checkpoint = open_checkpoint(str(folder))
    assert [file.name for file in checkpoint.shards()] == ["model.safetensors"]
    assert checkpoint.rival == "model.safetensors.index.json" and checkpoint.rival in checkpoint.unused
    assert_like_transformers(checkpoint)


def test_index_of_the_same_weights_is_no_rival(tmp_path: Path, llama: Path) -> None:
    folder = save_tiny(tmp_path / "m", max_shard_size="30KB")
    assert open_checkpoint(str(folder)).rival == ""
    shutil.copy(llama / "model.safetensors", folder)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.rival == "" and "model.safetensors.index.json" in checkpoint.unused


def test_other_copies_are_no_part_of_the_model(folder: Path, shards: Path) -> None:
    other = next(shards.glob("model-*"))
    for name in (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "stray.safetensors",
    ):
        shutil.copy(other, folder / name)
    (folder / "pytorch_model.bin").touch()
    (folder / "sub").mkdir()
    shutil.copy(other, folder / "sub")
    checkpoint = open_checkpoint(str(folder), allow_pickle=True)
    assert [file.name for file in checkpoint.shards()] == ["model.safetensors"]
    assert len(checkpoint.unused) == 5 and not checkpoint.rival
    assert_like_transformers(checkpoint)


def test_shard_that_no_index_names_is_no_part_of_the_model(tmp_path: Path, shards: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    save_file({PROBED: torch.zeros(32, 48)}, folder / "model-99999-of-99999.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.unused == ("model-99999-of-99999.safetensors",)
    assert_like_transformers(checkpoint)


def test_file_named_in_the_config_wins(folder: Path) -> None:
    tiny_model("llama", 2).save_pretrained(folder.parent / "second")
    shutil.copy(folder.parent / "second/model.safetensors", folder / "other.safetensors")
    change(folder / "config.json", transformers_weights="other.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert [file.name for file in checkpoint.shards()] == ["other.safetensors"]
    assert_like_transformers(checkpoint)
    for name in ("../other.safetensors", "gone.bin", 3, "sub/model.safetensors"):
        change(folder / "config.json", transformers_weights=name)
        assert code_of(folder) == "invalid-config"
    change(folder / "config.json", transformers_weights="gone.safetensors")
    assert code_of(folder) == "missing-shard"


def test_single_pickle_wins_over_its_index(folder: Path, shards: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "kept.safetensors")
    torch.save(load_file(folder.parent / "kept.safetensors"), folder / "pytorch_model.bin")
    other = {n: t for file in shards.glob("model-*") for n, t in load_file(file).items()}
    torch.save(other, folder / "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "pytorch_model-1.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_like_transformers(open_checkpoint(str(folder), allow_pickle=True))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("model.fp16.safetensors", "weights-not-named-model"),
        ("adapter_model.safetensors", "weights-not-named-model"),
        ("consolidated.safetensors", "weights-not-named-model"),
        ("pytorch_model.bin", "pickled-weights"),
        ("notes.md", "no-weights"),
    ],
)
def test_folder_without_weights_that_transformers_reads_is_refused(folder: Path, name: str, code: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert code_of(folder) == code


def test_adapters_and_distributed_checkpoints_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    assert code_of(folder) == "adapter-beside-model"
    (folder / "config.json").unlink()
    assert code_of(folder) == "adapter-only"
    (folder / "adapter_config.json").rename(folder / "config.json")
    shutil.copy(folder / "model.safetensors", folder / "shard-00000-model-00001-of-00002.safetensors")
    assert code_of(folder) == "distributed-checkpoint"


def test_index_that_does_not_match_its_shards_is_refused(tmp_path: Path, shards: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    table = content["weight_map"]
    other = next(file for file in table.values() if file != table[PROBED])
    for wrong in ({**table, "gone.weight": other}, {**table, PROBED: other}):
        index.write_text(json.dumps({**content, "weight_map": wrong}))
        assert code_of(folder) == "index-mismatch"
    index.write_text(json.dumps({"weight_map": table}))
    assert code_of(folder) == "damaged-index"
    index.write_text(json.dumps(content))
    (folder / other).unlink()
    assert code_of(folder) == "missing-shard"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "vocab.txt",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_opened(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    assert code_of(folder) == ("link-outside-folder" if kind == "device" else "not-a-regular-file")


@pytest.mark.parametrize(("name", "code"), [("config.json", "invalid-config"), ("vocab.json", "file-too-large")])
def test_far_too_large_files_are_not_read(folder: Path, name: str, code: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(2 << 30)  # a hole: it takes no room on the disk
    assert code_of(folder) == code
