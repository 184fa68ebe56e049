"""Checkpoints that exist only quantized: opened or kept while they are loaded, planned for, studied, exported as adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint, open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.model.tensor_info import DEQUANTIZED
from heretic.pipeline.prepare import run_preflight
from heretic.pipeline.run import Outcome, run
from heretic.planning.memory_plan import make_plan
from heretic.planning.workload import Workload
from heretic.progress import NULL_REPORTER
from heretic.settings import Settings
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.helpers.shapes import cpu, gpus
from tests.helpers.tiny_quantized import (
    FP4,
    SAVED,
    mxfp4,
    save_bnb,
    save_compressed,
    save_mlx,
    save_mxfp4,
    save_named,
    unpacked,
)

NEEDS_COMPRESSED_TENSORS = pytest.mark.skipif("compressed-tensors" not in SAVED, reason="needs compressed-tensors")
ALL = pytest.mark.parametrize("method", SAVED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    return {method: save(root / method) for method, save in SAVED.items()}


def loaded(folder: Path, dtype: str = "float32") -> LanguageModel:
    return load(open_checkpoint(str(folder)), [dtype], {"device_map": {"": "cpu"}})


def planned(checkpoint: Checkpoint, *devices: object, dtypes: tuple[str, ...] = ("auto",)) -> object:
    return make_plan(
        checkpoint,
        Workload(30, 8),
        device_map="planned",
        max_memory={},
        dtypes=dtypes,
        batch_size=4,
        devices=devices,  # type: ignore[arg-type]
    )


def test_packing_and_unpacking_are_inverse() -> None:
    tensor = torch.randn(3, 64)
    again = unpacked(*mxfp4(tensor))
    assert torch.equal(unpacked(*mxfp4(again)), again) and (again - tensor).norm() < 0.2 * tensor.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_opened_to_its_numbers(folders: dict[str, Path], dtype: str) -> None:
    model = loaded(folders["fp8"], dtype)
    name = "model.layers.1.mlp.down_proj.weight"
    stored, scale = (model.checkpoint.read(n) for n in (name, f"{name}_scale_inv"))
    expected = stored.float() * scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    found = model.model.get_parameter(name)
    assert found.dtype == getattr(torch, dtype) == model.model.dtype and model.dtype == dtype
    assert torch.allclose(found.float(), expected, rtol=1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_is_opened_to_its_numbers(folders: dict[str, Path], dtype: str) -> None:
    model = loaded(folders["mxfp4"], dtype)
    for name in ("model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"):
        expected = unpacked(*(model.checkpoint.read(f"{name}_{part}") for part in ("blocks", "scales"))).mT
        assert torch.equal(model.model.get_parameter(name).float(), expected), "exact: 2 bits and an exponent"


def dense(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight that compressed-tensors has packed in the tensors of one layer, by the formulas of its formats."""
    scale = tensors["weight_scale"].float()
    if "weight" in tensors:  # int8 with a scale for a row, or e4m3 with one for all
        return tensors["weight"].float() * scale
    packed = tensors["weight_packed"]
    if packed.dtype == torch.int32:  # 8 numbers of 4 bits plus 8
        numbers = torch.stack([(packed >> 4 * i) & 15 for i in range(8)], dim=-1).flatten(-2).float() - 8
    else:  # NVFP4: two e2m1 numbers in a byte
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
        numbers = FP4[codes % 8] * (1 - 2 * (codes // 8))
        scale = scale / tensors["weight_global_scale"]
    return numbers * scale.repeat_interleave(numbers.shape[1] // scale.shape[1], dim=1)


@pytest.mark.parametrize("preset", ["W4A16", "W8A8", "FP8", "NVFP4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compressed_tensors_are_opened_to_their_numbers(tmp_path: Path, preset: str, dtype: str) -> None:
    pytest.importorskip("compressed_tensors")
    model = loaded(save_compressed(tmp_path / "m", preset), dtype)
    layer = "model.layers.1.mlp.down_proj"
    names = [n.rpartition(".") for n in model.checkpoint.tensors if n.startswith(f"{layer}.")]
    expected = dense({part: model.checkpoint.read(f"{path}.{part}") for path, _, part in names})
    found = model.model.get_parameter(f"{layer}.weight")
    assert found.dtype == getattr(torch, dtype) == model.model.dtype
    assert torch.allclose(found.float(), expected, rtol=2**-8, atol=1e-6)
    assert model.checkpoint.parameters == sum(p.numel() for p in model.model.parameters())


@ALL
def test_parameters_are_those_that_are_packed(folders: dict[str, Path], method: str) -> None:
    model = loaded(folders[method])
    expected = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.model.parameters())
    assert model.checkpoint.quantized_by == method and model.checkpoint.parameters == expected


@ALL
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_the_plan_counts_what_is_loaded(folders: dict[str, Path], method: str, dtype: str) -> None:
    checkpoint = open_checkpoint(str(folders[method]))
    plan = planned(checkpoint, cpu(4), dtypes=(dtype,))
    model = loaded(folders[method], plan.dtype)  # type: ignore[attr-defined]
    held = sum(p.numel() * p.element_size() for p in model.model.parameters())
    if method == "bitsandbytes":
        scales = (t.nbytes for n, t in checkpoint.tensors.items() if ".weight." in n)
        held += sum(scales)
        assert dtype != "auto" or plan.dtype == "bfloat16"  # type: ignore[attr-defined]
    elif dtype == "auto":
        assert plan.dtype == "float32"  # type: ignore[attr-defined]
    if method != "bitsandbytes" or dtype != "float32":  # it is loaded as bfloat16 whatever is asked for
        assert plan.weights == pytest.approx(held, rel=0.001)  # type: ignore[attr-defined]
    if method in DEQUANTIZED:  # its largest weight exists in float32 while it is dequantized
        largest = max(part.tensor.numel() for writer in model.structure.writers for part in writer.parts)
        assert all(load.loading > 4 * largest for load in plan.loads)  # type: ignore[attr-defined]
    on_gpu = planned(checkpoint, *gpus(1, 24), cpu(4))
    assert on_gpu.dtype == "bfloat16"  # type: ignore[attr-defined]


@ALL
@pytest.mark.parametrize("geometry", ["plain", "norm_preserving"])
def test_operators_move_it_and_have_gradients(folders: dict[str, Path], method: str, geometry: str) -> None:
    model = loaded(folders[method])
    width = model.structure.width
    torch.manual_seed(2)
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, width), dim=1))
    model_context = OperatorFactory.prepare(directions, model.structure.writers, geometry)
    strengths = {c: torch.full((4,), 0.9, requires_grad=True) for c in model.structure.components}
    tokens = torch.tensor([[5, 20, 40, 33, 9]])
    before = model.model(input_ids=tokens).logits
    with apply_operators(model.structure.writers, model_context.operators(Ablation(strengths), zeros_from=0)):
        after = model.model(input_ids=tokens).logits
    slopes = torch.autograd.grad(after.float().square().mean(), list(strengths.values()))
    assert (after - before).norm() > 0.01 * before.norm() and all(s.isfinite().all() and s.any() for s in slopes)


def do(config: Path, model: Path, *assignments: str, **options: object) -> Outcome:
    return run(
        resolve(config, {"model": str(model), "n_trials": 2, **options}, assignments),
        reporter=NULL_REPORTER,
        stop=StopSignal(),
    )


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes"])
def test_a_study_on_it_is_exported_as_an_adapter(config: Path, folders: dict[str, Path], method: str) -> None:
    export = do(config, folders[method], "export_format=lora", "lora_rank=128", save_to="out").export
    assert export is not None and export.verification.divergence < 2e-3
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["written"]["format"] == "lora" and manifest["dtype"] in ("float32", "bfloat16")


def test_one_that_stays_packed_has_no_weights_to_edit(config: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError) as caught:
        do(config, folders["bitsandbytes"], save_to="out")
    assert caught.value.where == "preflight: export" and "bitsandbytes" in caught.value.what
    assert 'export_format = "lora"' in str(caught.value.fix)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("fp8", "auto"),
        ("fp8", "bfloat16"),
        ("mxfp4", "bfloat16"),
        pytest.param("compressed-tensors", "bfloat16", marks=NEEDS_COMPRESSED_TENSORS),
    ],
)
def test_an_opened_one_is_exported_as_a_folder_in_bfloat16(
    config: Path, folders: dict[str, Path], method: str, dtype: str
) -> None:
    chosen = ("max_kl=50", "search.mlp.max_weight=[0.9,1.5]", f'dtypes=["{dtype}"]')
    export = do(config, folders[method], *chosen, save_to="out").export
    assert export is not None and export.verification.divergence < 5e-3
    written, before = open_checkpoint("out"), loaded(folders[method], "bfloat16").model
    assert written.quantized_by is None and not written.is_dequantized
    assert {t.dtype for t in written.tensors.values()} <= {"BF16", "F32"}
    after = load(written, ["bfloat16"], {"device_map": {"": "cpu"}}).model
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    down = "mlp.experts.down_proj" if method == "mxfp4" else "mlp.down_proj.weight"
    assert changed and all(n.endswith(("o_proj.weight", "o_proj.bias", down, f"{down}_bias")) for n in changed)
    assert any(n.endswith(down) for n in changed)
    assert f"stored as {DEQUANTIZED[method]}" in Path("out/README.md").read_text()


def test_experts_in_one_tensor_take_no_adapter_and_that_is_said(config: Path, folders: dict[str, Path]) -> None:
    with raises("export-format-not-supported") as caught:
        do(config, folders["mxfp4"], "export_format=lora", save_to="out")
    assert caught.value.fix == 'export_format = "full"'
    assert not Path("out").exists()


def test_8_bits_of_bitsandbytes_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_bnb(tmp_path / "eight", bits=8)))
    model = load(checkpoint, ["bfloat16"], {"device_map": {"": "cpu"}})
    assert checkpoint.parameters == sum(p.numel() for p in model.model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.model.parameters())
    held += sum(t.nbytes for n, t in checkpoint.tensors.items() if n.endswith(".SCB"))
    assert planned(checkpoint, cpu(4)).weights == pytest.approx(held, rel=0.001)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "hqq"])
def test_a_missing_package_is_named_before_anything_is_loaded(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heretic.model.quantization._is_installed", lambda _: False)
    folder = save_named(tmp_path / "m", method)
    with raises("missing-package") as caught:
        loaded(folder)
    assert method in caught.value.what and "pip install" in str(caught.value.fix)
    assert len(str(caught.value).splitlines()) <= 3
    prompts = {
        f"{kind}_{part}": {"source": f"bundled:{name}_{part}"}
        for kind, name in (("harmful", "cooking"), ("harmless", "other"))
        for part in ("train", "eval")
    }  # the default ones would be looked for on the hub
    report = run_preflight(
        Settings.model_validate({"model": str(folder), "runs_dir": str(tmp_path), "prompts": prompts})
    )
    assert any(f.level == "failure" and f.subject == "model" and method in f.text for f in report.findings)


def test_a_method_that_nobody_knows_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    with raises("unknown-quantization") as caught:
        loaded(save_named(tmp_path / "m", "magic"))
    assert "magic" in caught.value.what and len(str(caught.value).splitlines()) <= 3


def test_several_schemes_of_compressed_tensors_are_refused(tmp_path: Path) -> None:
    folder = save_named(tmp_path / "m", "compressed-tensors")
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    groups = {"attention": {"weights": weights}, "mlp": {"weights": {**weights, "num_bits": 8}}}
    config["quantization_config"]["config_groups"] = groups
    (folder / "config.json").write_text(json.dumps(config))
    with raises("mixed-quantization"):
        loaded(folder)


def test_nvfp4_of_modelopt_is_refused(tmp_path: Path) -> None:
    with raises("unknown-quantization"):
        loaded(save_named(tmp_path / "m", "modelopt"))


def test_a_model_that_mlx_has_quantized_is_refused(tmp_path: Path) -> None:
    folder = save_mlx(tmp_path / "m")
    with raises("unknown-quantization"):
        loaded(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # older versions write `quantization` alone
    (folder / "config.json").write_text(json.dumps(config))
    with raises("no-quantization-config"):
        loaded(folder)


def test_weights_are_not_put_back_from_quantized_files(config: Path, tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "m")
    with pytest.raises(UserError) as caught:
        do(config, folder, "apply=weights", "cache_weights=false")
    assert caught.value.where == "preflight: apply"
    assert do(config, folder, "apply=weights").results, "with copies it can: they are opened in memory"
