"""Models converted to MLX by mlx_lm, on a CPU, and read back by it; and what the comparison finds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heretic.errors import UserError, VerificationFailed
from heretic.export.export import Export
from heretic.export.mlx import check_folder
from heretic.export.save import TensorEdit
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import open_checkpoint
from heretic.pipeline.reproduce import reproduce
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.helpers.tiny_quantized import WIDE, model_of, save
from tests.tiny import save_tiny

HERE = all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))
NEEDS_MLX = pytest.mark.skipif(not HERE and not os.environ.get("CI"), reason="needs mlx-lm[cpu]")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 whose rows are whole groups; not to be changed."""
    model = model_of("LlamaConfig", WIDE)
    return save(tmp_path_factory.mktemp("mlx") / "m", model, dict(model.state_dict()), None)


def export(config: Path, model: Path, *assignments: str) -> Export:
    options = {"model": str(model), "save_to": "out", "n_trials": 1, "export_format": "mlx", "max_kl": 50.0}
    strong = ("search.attention.max_weight=[1.0, 1.2]", "search.mlp.max_weight=[1.0, 1.2]", 'dtypes=["float32"]')
    found = run(resolve(config, options, (*strong, *assignments)), reporter=NULL_REPORTER, stop=StopSignal()).export
    assert found is not None
    return found


def packed(weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """A matrix as mlx stores it, with the smallest number of a group as its bias."""
    groups = weight.float().unflatten(-1, (-1, 64))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    numbers = ((groups - low) / scale).round().long().flatten(-2).unflatten(-1, (-1, 32 // bits))
    words = sum(numbers[..., i] << bits * i for i in range(32 // bits))
    assert isinstance(words, torch.Tensor)
    unsigned = words.to(torch.int64).to(torch.uint32)
    return {"weight": unsigned, "scales": scale[..., 0].bfloat16(), "biases": low[..., 0].bfloat16()}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("damage", ["", "values", "shape", "missing"])
def test_every_matrix_is_compared(wide: Path, tmp_path: Path, bits: int, damage: str) -> None:
    tensors, made = load_file(wide / "model.safetensors"), tmp_path / "made"
    made.mkdir()
    weight = tensors.pop(DOWN)
    weight = {"values": weight.roll(1, 0), "shape": weight[:-1]}.get(damage, weight).contiguous()
    stored = {"weight": weight} if bits == 16 else packed(weight, bits)
    if damage != "missing":
        tensors |= {f"{DOWN.removesuffix('.weight')}.{part}": tensor for part, tensor in stored.items()}
    save_file(tensors, made / "model.safetensors")
    edits = {DOWN: TensorEdit(None, is_bias=False, transposed=False)}  # type: ignore[arg-type]
    checkpoint = open_checkpoint(str(wide))
    if not damage:
        return check_folder(made, checkpoint, edits, NULL_REPORTER, StopSignal())
    with pytest.raises(VerificationFailed) as error:
        check_folder(made, checkpoint, edits, NULL_REPORTER, StopSignal())
    assert error.value.code == "mlx-verification-failed" and DOWN in error.value.what
    return None


def test_a_missing_program_is_named_before_the_study(
    config: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heretic.export.mlx.importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with raises("mlx-missing"):
        export(config, llama)
    assert not list(Path().glob("runs/*"))


def answered(folder: str, tokens: list[int]) -> torch.Tensor:
    """Logits of a folder in mlx."""
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(folder)
    return torch.tensor(model(mx.array([tokens])).astype(mx.float32).tolist())


def test_mixtures_of_experts_are_refused_before_the_study(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heretic.export.mlx.converter", lambda: ["mlx_lm"])
    with raises("export-format-not-supported"):
        export(config, save_tiny(tmp_path / "m", "mixtral"))
    assert not list(Path().glob("runs/*"))


@NEEDS_MLX
def test_mlx_runs_the_model_that_was_measured(config: Path, wide: Path) -> None:
    proof = export(config, wide).verification
    assert proof.divergence < 1e-2 and proof.tensors_checked
    assert "library_name: mlx" in Path("out/README.md").read_text()
    tokens = [5, 20, 40, 33, 9, 30]
    with torch.no_grad():
        same = AutoModelForCausalLM.from_pretrained(
            "out", dtype=torch.float32
        )  # unquantized, it is a folder like any other
        expected = same(input_ids=torch.tensor([tokens])).logits
    assert (answered("out", tokens) - expected).norm() < 0.02 * expected.norm()


@NEEDS_MLX
def test_quantized_it_runs_and_is_rebuilt_and_a_failure_says_why(
    config: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(config, wide, "mlx_bits=4")
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["written"]["format"] == "mlx" and manifest["written"]["bits"] == 4
    assert answered("out", [5, 20]).isfinite().all()
    again = reproduce(Path("out"), None, base=str(wide), reporter=NULL_REPORTER, stop=StopSignal())
    assert again.verdict == "identical"
    program = Path("broken").resolve()
    program.write_text("#!/bin/sh\necho no such architecture; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("heretic.export.mlx.converter", lambda: [str(program)])
    shutil.rmtree("out")
    with pytest.raises(UserError) as error:
        export(config, wide, "mlx_bits=4")
    assert error.value.code == "mlx-conversion-failed" and "no such architecture" in error.value.what
