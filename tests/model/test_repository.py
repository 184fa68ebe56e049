"""What the names of a model's files mean, and which links are followed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from heretic.errors import UserError
from heretic.model.checkpoint import open_checkpoint
from heretic.model.repository import check_links, kind_of, resolve_inside

KINDS = {
    "support": [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "vocab.bpe", "spiece.model", "tokenizer.model",
        "tokenizer.model.v3", "sentencepiece.bpe.model", "qwen.tiktoken", "source.spm", "tekken.json", "chat_template.jinja",
        "chat_template.json", "additional_chat_templates/rag.jinja", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json", "decoder_tokenizer/tokenizer.json", "tokenizer/vocab.json", "entity_vocab.json",
        "model.safetensors.index.json",
    ],
    "weights": ["model.safetensors", "pytorch_model.bin", "x.gguf", "tokenizer/model.safetensors"],
    "terms": [
        "LICENSE", "LICENSE.txt", "License.md", "LICENCE-MODEL", "LLAMA 3 COMMUNITY LICENSE.pdf", "NOTICE", "Notice.txt",
        "USE_POLICY.md", "COPYING", "licenses/third.txt", "模型许可协议.pdf", "LICENSE-2.0",
    ],
    "code": ["modeling_x.py"],
    "card": ["README.md"],
    "other": [
        "notes.txt", "added.json", ".env", "train.py/x", "onnx/config.json", "checkpoint-1/tokenizer.json", "params.json",
        "hf_quant_config.json", "quantize_config.json", "license_data.csv", "additional_chat_templates/.hidden.jinja",
        "tokenizer/x.py",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_name_has_the_kind_that_programs_give_it(kind: str, name: str) -> None:
    assert kind_of(name) == kind


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside every model's folder."""
    path = tmp_path / "secret"
    path.write_text("key")
    return path


@pytest.mark.parametrize(
    "name", ["LICENSE", "added_tokens.json", "README.md", "model.safetensors", "modeling.py", "tokenizer/vocab.json"]
)
def test_model_with_a_link_out_of_its_folder_is_refused(llama: Path, tmp_path: Path, secret: Path, name: str) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError) as error:
        open_checkpoint(str(folder))
    assert error.value.code == "link-outside-folder" and error.value.where == str(folder / name)


def test_linked_folder_of_templates_is_refused(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(UserError) as error:
        check_links(tmp_path / "model")
    assert error.value.code == "link-outside-folder"


def test_links_within_the_folder_and_into_the_cache_are_followed(tmp_path: Path, secret: Path) -> None:
    repository = tmp_path / "hub/models--a--b"
    snapshot = repository / "snapshots/0123"
    for folder in (snapshot, repository / "blobs", tmp_path / "hub/blobs/ab"):
        folder.mkdir(parents=True)
    for blob in (repository / "blobs/1", tmp_path / "hub/blobs/ab/2", snapshot / "config.json"):
        blob.write_text("{}")
    links = {"tokenizer.json": "../../blobs/1", "vocab.json": "../../../blobs/ab/2", "merges.txt": "config.json"}
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    check_links(snapshot)
    assert resolve_inside(snapshot, snapshot / "tokenizer.json") == (repository / "blobs/1").resolve()
    (tmp_path / "alias").symlink_to(snapshot)
    check_links(tmp_path / "alias")
    (snapshot / "LICENSE").symlink_to(secret)
    with pytest.raises(UserError):
        check_links(tmp_path / "alias")


def test_unknown_file_may_be_a_link_and_is_not_followed(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/notes.txt").symlink_to(secret)
    check_links(tmp_path / "model")
