"""Token ids of configurations: padding, ends, and ids that the model does not know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from heretic.errors import UserError
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import LanguageModel, ids_of, load
from tests.helpers.tiny_gguf import save_tiny_gguf
from tests.tiny import VOCABULARY


@pytest.mark.parametrize(
    ("given", "ids"), [(None, []), (3, [3]), ("3", [3]), ([3, "4", None], [3, 4]), ([], []), (-1, [-1]), ((5.0,), [5])]
)
def test_token_ids_come_as_one_as_several_and_as_text(given: Any, ids: list[int]) -> None:
    assert ids_of(given) == ids


@pytest.mark.parametrize("given", ["x", {}, True, 2.5, float("nan"), [[1]]])
def test_what_is_no_token_id_is_refused(given: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        ids_of(given)


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def changed(file: Path, **keys: object) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **keys}))


def loaded(folder: Path) -> LanguageModel:
    return load(open_checkpoint(str(folder)), ["float32"], {})


@pytest.mark.parametrize("end", [[2, VOCABULARY, 10**6], ["2"], "2", [2, -1, None]])
def test_ends_that_the_model_cannot_say_are_harmless(folder: Path, end: object) -> None:
    changed(folder / "generation_config.json", eos_token_id=end)
    assert loaded(folder).end_tokens == {2}


@pytest.mark.parametrize("end", ["two", [[2]], 2.5, {"a": 1}])
def test_ends_that_are_no_token_ids_are_an_error(folder: Path, end: object) -> None:
    changed(folder / "generation_config.json", eos_token_id=end)
    with pytest.raises(UserError) as error:
        loaded(folder)
    assert error.value.code in ("invalid-eos-token", "model-not-loadable", "invalid-config", "damaged-model-file")


@pytest.mark.parametrize("number", [None, -1, VOCABULARY, 10**6])
def test_padding_outside_the_embedding_gives_way_to_a_token_that_is_known(folder: Path, number: int | None) -> None:
    changed(folder / "config.json", pad_token_id=number)
    model = loaded(folder)
    assert model.rows == VOCABULARY and model.pad == 0
    model.tokenizer.add_tokens([f"w{i}" for i in range(60)])
    model.tokenizer.pad_token = "w59"
    assert model.tokenizer.pad_token_id >= VOCABULARY and model.pad == 2, "the end's token will do"
    model.tokenizer.pad_token = model.tokenizer.eos_token = None
    assert model.pad == 0 and model.end_tokens == {2}


def test_a_folder_without_a_tokenizer_is_an_error_not_an_empty_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError) as error:
        loaded(folder)
    assert error.value.code == "no-tokenizer"


def test_a_gguf_file_loads_without_a_progress_bar_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(open_checkpoint(str(save_tiny_gguf(tmp_path / "tiny.gguf"))), ["float32"], {})
    assert "de-quantizing" not in capfd.readouterr().err
