"""Directions for other programs, read back as those programs read them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.command import heretic


@pytest.fixture
def found(config: Path) -> torch.Tensor:
    """The directions of a run named "mine"."""
    folder = run(resolve(config, {"n_trials": 1, "run_name": "mine"}), reporter=NULL_REPORTER, stop=StopSignal()).folder
    directions = folder.load_directions(NULL_REPORTER)
    assert directions is not None
    return directions.vectors


def test_safetensors(found: torch.Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = heretic(capsys, monkeypatch, "directions", "-o", "here/d.safetensors")
    assert said.status == 0 and "here/d.safetensors" in said.out
    with safe_open("here/d.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("directions"), found) and list(file.keys()) == ["directions"]
        assert file.metadata()["layout"].startswith("row l: unit direction after block l") and file.metadata()["model"]
    again = heretic(capsys, monkeypatch, "directions", "mine", "-o", "here/d.safetensors")
    assert again.status == 1 and "[file-exists]" in again.err and "d.safetensors" in again.err


def test_a_control_vector(
    found: torch.Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heretic(capsys, monkeypatch, "directions", "mine", "-o", "d.bin", "--format", "gguf").status == 0
    reader = gguf.GGUFReader("d.bin")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == len(found) - 1
    layers = {int(t.name.removeprefix("direction.")): t for t in reader.tensors}
    assert list(layers) == [1, 2, 3], "llama.cpp has no place for block 0"
    for layer, tensor in layers.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, found[layer].numpy())
    assert not list(Path().glob(".d.bin*"))


def test_several_directions_a_layer_are_all_written(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("directions.method=self_organizing_map", "directions.count=2", "directions.iterative_rounds=1")
    folder = run(
        resolve(config, {"n_trials": 1, "run_name": "mine"}, wanted), reporter=NULL_REPORTER, stop=StopSignal()
    ).folder
    directions = folder.load_directions(NULL_REPORTER)
    assert directions is not None and directions.extra is not None and directions.count == 4
    said = heretic(capsys, monkeypatch, "directions", "mine", "-o", "d.safetensors")
    assert said.status == 0 and "d.safetensors" in said.out
    with safe_open("d.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("directions"), directions.vectors)
        assert torch.equal(file.get_tensor("extra"), directions.extra)
        assert "extra: the others of each" in file.metadata()["layout"]
    said = heretic(capsys, monkeypatch, "directions", "mine", "-o", "d.gguf")
    assert (
        said.status == 0 and "has 4 directions" in said.out and "d-4.gguf" in said.out and not Path("d.gguf").exists()
    )
    for number in range(4):
        tensors = {t.name: t.data for t in gguf.GGUFReader(f"d-{number + 1}.gguf").tensors}
        assert list(tensors) == ["direction.1", "direction.2", "direction.3"]
        for layer in (1, 2, 3):
            assert np.array_equal(tensors[f"direction.{layer}"], directions.all_directions[layer, number].numpy())
    Path("d-1.gguf").unlink()
    said = heretic(capsys, monkeypatch, "directions", "mine", "-o", "d.gguf")
    assert (
        said.status == 1 and "[file-exists]" in said.err and "d-2.gguf" in said.err and not Path("d-1.gguf").exists()
    ), "all of them or none"


def test_places_that_can_be_no_file(
    found: torch.Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("folder.gguf").mkdir()
    Path("file").touch()
    for place, wrong in {"folder.gguf": "folder.gguf", "file/d.gguf": "file", "file": "--output file"}.items():
        said = heretic(capsys, monkeypatch, "directions", "mine", "-o", place)
        assert said.status == 1 and f"Where: {wrong}" in said.err.replace(str(Path().resolve()) + "/", ""), said.err
    said = heretic(capsys, monkeypatch, "directions", "mine", "-o", "", "--format", "gguf")
    assert said.status == 1 and said.err.startswith("Error:")


def test_what_is_not_there(
    found: torch.Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = heretic(capsys, monkeypatch, "directions", "mine", "-o", "d.txt")
    assert said.status == 1 and "[unknown-format]" in said.err and "'txt'" in said.err and "gguf" in said.err
    Path("runs/mine/directions.safetensors").unlink()
    said = heretic(capsys, monkeypatch, "directions", "mine", "-o", "d.gguf")
    assert said.status == 1 and "[no-directions]" in said.err and not Path("d.gguf").exists()
