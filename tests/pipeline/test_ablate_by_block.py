"""One ablation of a model that is read block by block: the same tensors as of a model in memory, and no scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import heretic.model.block_capture as capturing
from tests.helpers.command import heretic
from tests.tiny import save_tiny

GIVEN = ("--strength", "0.8", "--set", 'response_prefix=""', "--json")


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma3", ("--layer", "1.5")),
        ("mixtral", ()),
        ("gpt2", ("--set", "ablation.geometry=plain", "--set", "directions.iterative_rounds=1")),
    ],
)
def test_the_tensors_are_those_of_a_model_in_memory(
    family: str,
    more: tuple[str, ...],
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_tiny(tmp_path / family, family)
    for output, option in (("whole", ()), ("blocks", ("--by-block",))):
        ran = heretic(capsys, monkeypatch, "ablate", str(folder), "-o", output, *GIVEN, *more, *option)
        assert ran.status == 0, ran.err
    original, whole, blocks = tensors(str(folder)), tensors("whole"), tensors("blocks")
    assert whole.keys() == blocks.keys() == original.keys()
    assert all(torch.allclose(blocks[name], whole[name], atol=1e-5) for name in whole)
    edited = {name for name in whole if not torch.equal(blocks[name], original[name])}
    assert edited == {name for name in whole if not torch.equal(whole[name], original[name])} != set()
    manifest = json.loads(Path("blocks/manifest.json").read_text())
    assert manifest["scores"] is None and manifest["verification"]["tensors_checked"] == len(edited)
    assert json.loads(ran.out)["scores"] is None and json.loads(ran.out)["original_refusals"] is None


def test_another_strength_does_not_compute_the_directions_again(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = heretic(capsys, monkeypatch, "ablate", "-o", "one", "--strength", "1", "--by-block")
    assert first.status == 0 and "not measured" in first.out and "heretic evaluate" in first.out, first.err
    card = Path("one/README.md").read_text()
    assert "Nothing was measured" in card and "Wilson" not in card

    def capture(*_: Any, **__: Any) -> None:
        raise AssertionError("the directions are known")

    monkeypatch.setattr(capturing, "_run", capture)
    second = heretic(capsys, monkeypatch, "ablate", "-o", "two", "--strength", "0.5", "--by-block")
    assert second.status == 0, second.err
    rebuilt = heretic(capsys, monkeypatch, "reproduce", "two", "-o", "three", "--json")
    assert rebuilt.status == 0 and json.loads(rebuilt.out)["verdict"] == "identical", rebuilt.err
    assert "Nothing was measured" in Path("three/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "where"),
    [
        ([], "conflicting-options", "--by-block"),
        (["--strength", "1", "--set", "ablation.geometry=conditional"], "not-by-block", "ablation.geometry"),
        (["--strength", "1", "--set", "export_format=lora"], "not-by-block", "export_format"),
        (["--strength", "1", "--set", "device_map={'' = 'cpu'}"], "not-by-block", "device_map"),
        (["--strength", "1", "--layer", "9"], "invalid-option", "--layer"),
    ],
)
def test_what_cannot_be_done_by_block_is_an_error(
    arguments: list[str],
    code: str,
    where: str,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = heretic(capsys, monkeypatch, "ablate", "-o", "out", "--by-block", *arguments)
    assert (ran.status, ran.code) == (1, code) and not Path("out").exists()
    assert where in ran.err
