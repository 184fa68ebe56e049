"""What goes with the weights into an export, and what stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from heretic.errors import UserError
from heretic.export.companions import copied_files, copy_companions, copy_license_files, find_companions
from heretic.files import sha256
from tests.helpers.reporters import RecordingReporter
from tests.tiny import TEMPLATE, tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's folder with a tokenizer and a config, and without weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def to(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "to").mkdir()
    return tmp_path / "to"


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def auto_map(folder: Path, value: Any, name: str = "config.json") -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, "auto_map": value}))


def test_further_templates_and_tokenizers_are_copied(base: Path, to: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "rag": "RAG " + TEMPLATE}
    tokenizer.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base / "decoder_tokenizer")
    hashes = copy_companions(base, to)
    assert AutoTokenizer.from_pretrained(to).chat_template == tokenizer.chat_template
    assert (to / "decoder_tokenizer/tokenizer.json").is_file()
    assert hashes["copied"]["additional_chat_templates/rag.jinja"] == sha256(
        base / "additional_chat_templates/rag.jinja"
    )
    assert not hashes["changed"]


def test_other_files_stay_behind(base: Path, to: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    for name in ("diary.txt", "hf_quant_config.json", "train.py", ".env"):
        (base / name).write_text("mine")
    (base / "onnx").mkdir()
    copy_companions(base, to)
    assert {"notes.txt", "diary.txt", "hf_quant_config.json", "train.py", ".env", "onnx"}.isdisjoint(
        path.name for path in to.iterdir()
    )
    reporter = RecordingReporter()
    copy_companions(base, to, unused=("mtp.safetensors",), reporter=reporter)
    assert any("mtp.safetensors" in line for line in reporter.lines)
    assert find_companions(base).left == ["diary.txt", "hf_quant_config.json", "notes.txt", "onnx/", "train.py"]


def test_license_that_is_a_link_out_of_the_folder_is_refused(base: Path, to: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    for copy in (lambda: copy_companions(base, to), lambda: copy_license_files(base, to, "")):
        with pytest.raises(UserError) as error:
            copy()
        assert error.value.code == "link-outside-folder" and not list(to.iterdir())


def test_code_of_auto_map_is_copied_with_what_it_imports_and_names(base: Path, to: Path) -> None:
    auto_map(base, {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoProcessor": "a/other--code.P"})
    auto_map(base, {"AutoTokenizer": ["slow.T", None]}, "tokenizer_config.json")
    put(base, own="from .layers import x\n", layers="import torch\n", slow='FILES = {"v": "words.dat"}\n', idle="")
    (base / "words.dat").write_text("a b c")
    found = find_companions(base)
    assert {"own.py", "layers.py", "slow.py", "words.dat"} <= found.copied.keys()
    assert found.left == ["idle.py"] and not found.changed


def test_auto_map_entries_without_their_file_are_dropped(base: Path, to: Path) -> None:
    auto_map(base, {"AutoConfig": "own.C", "AutoModel": "gone.M", "AutoProcessor": "a/other--code.P"})
    auto_map(base, {"AutoTokenizer": ["gone.T", None]}, "tokenizer_config.json")
    put(base, own="")
    hashes = copy_companions(base, to)
    kept = json.loads((to / "config.json").read_text())["auto_map"]
    assert kept == {"AutoConfig": "own.C", "AutoProcessor": "a/other--code.P"}
    assert "auto_map" not in json.loads((to / "tokenizer_config.json").read_text())
    assert hashes["changed"].keys() == {"config.json", "tokenizer_config.json"}


@pytest.mark.parametrize("reference", ["../../etc.C", "/etc/x.C", "..C", "", ".", "own"])
def test_auto_map_leads_to_no_file_outside(base: Path, reference: str) -> None:
    (base.parent / "etc.py").write_text("")
    auto_map(base, {"AutoConfig": reference})
    assert not [name for name in copied_files(base) if name.endswith(".py")]


def test_template_of_the_settings_takes_the_place_of_the_model_s_own(base: Path, to: Path) -> None:
    config = json.loads((base / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "RAG"}]
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text('{"chat_template": "old"}')
    hashes = copy_companions(base, to, template="new")
    assert AutoTokenizer.from_pretrained(to).chat_template == {"default": "new", "rag": "RAG"}
    assert "chat_template" not in json.loads((to / "tokenizer_config.json").read_text())
    assert not (to / "chat_template.json").exists() and "chat_template.jinja" in hashes["changed"]


def test_terms_and_template_go_with_every_format(base: Path, to: Path) -> None:
    (base / "LICENSE").write_text("terms")
    copy_license_files(base, to, "new")
    assert {p.name: p.read_text() for p in to.iterdir()} == {"LICENSE": "terms", "chat_template.jinja": "new"}


def test_config_that_is_no_json_is_copied_as_it_is(base: Path, to: Path) -> None:
    (base / "generation_config.json").write_bytes(b"\xff[")
    copy_companions(base, to, template="new")
    assert (to / "generation_config.json").read_bytes() == b"\xff["
