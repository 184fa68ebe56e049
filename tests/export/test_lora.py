"""Adapters: exact where the edit is of rank 1, the nearest of a rank elsewhere, and read by peft as anybody would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heretic.ablation.geometries.norm_preserving import norm_preserving
from heretic.ablation.operator import Operator
from heretic.ablation.weight_stats import weight_statistics
from heretic.export.lora import KNOWN_KEYS, low_rank_change
from heretic.export.save import TensorEdit
from heretic.interrupt import StopSignal
from heretic.pipeline.actions import Evaluation, evaluate_model
from heretic.pipeline.reproduce import reproduce
from heretic.pipeline.run import Outcome, run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.helpers.reporters import RecordingReporter
from tests.tiny import save_tiny

STRONG = ("search.attention.max_weight=[1.4, 1.5]", "search.mlp.max_weight=[1.4, 1.5]")


def do(config: Path, model: Path, save_to: str, *assignments: str) -> Outcome:
    options = {"model": str(model), "save_to": save_to, "n_trials": 2}
    return run(resolve(config, options, (*STRONG, *assignments)), reporter=NULL_REPORTER, stop=StopSignal())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 20, 40, 33, 9]])).logits


@pytest.mark.parametrize(("family", "geometry"), [("llama", "row_normalized"), ("gpt2", "plain"), ("gemma3", "plain")])
def test_an_adapter_of_rank_1_is_the_full_model(config: Path, tmp_path: Path, family: str, geometry: str) -> None:
    folder = save_tiny(tmp_path / "m", family)
    chosen = f"ablation.geometry={geometry}"
    adapter = do(config, folder, "adapter", chosen, "export_format=lora").export
    assert adapter is not None and adapter.verification.divergence < 1e-6
    full = do(config, folder, "full", chosen).export
    assert full is not None and full.verification.scores.refusals == adapter.verification.scores.refusals
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(base)
    peft = PeftModel.from_pretrained(base, "adapter")
    after = logits(AutoModelForCausalLM.from_pretrained("full"))
    assert (logits(peft) - after).abs().max() < 1e-4 < 0.05 < (before - after).abs().max()
    assert (logits(peft.merge_and_unload()) - after).abs().max() < 1e-4
    manifest = json.loads(Path("adapter/manifest.json").read_text())
    assert manifest["written"]["format"] == "lora" and manifest["written"]["rank"] == 1 and manifest["written"]["exact"]
    card = Path("adapter/README.md").read_text()
    assert "library_name: peft" in card and "LoRA adapter of rank 1" in card and "holds every edit exactly" in card
    assert {p.name for p in Path("adapter").iterdir()} == {
        "README.md", "manifest.json", "heretic", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(("family", "more"), [("llama", {}), ("gpt2", {"lora_bias": True})])
def test_the_config_has_the_keys_of_older_readers_and_what_is_not_default(
    config: Path, tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    folder = save_tiny(tmp_path / "m", family)
    do(config, folder, "adapter", "ablation.geometry=plain", "export_format=lora")
    written = json.loads(Path("adapter/adapter_config.json").read_text())
    assert set(written) == KNOWN_KEYS | set(more) and more.items() <= written.items()
    whole = LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=written["base_model_name_or_path"], r=1, lora_alpha=1,
        target_modules=written["target_modules"], fan_in_fan_out=family == "gpt2", inference_mode=True, **more,
    )  # fmt: skip
    assert PeftConfig.from_pretrained("adapter").to_dict() == whole.to_dict()


def test_an_adapter_is_evaluated_with_its_model(config: Path, llama: Path, tmp_path: Path) -> None:
    export = do(config, llama, "adapter", "ablation.geometry=plain", "export_format=lora").export
    assert export is not None

    def evaluated(against: str | None) -> Evaluation:
        settings = resolve(config, {"model": "adapter"}).settings
        return evaluate_model(settings, against, wait=False, reporter=NULL_REPORTER, stop=StopSignal())

    # 1. With the model that its config names, and with one of that name
    found = evaluated(str(llama))
    assert found.model == "adapter" and found.refusals == export.verification.scores.refusals
    kl = export.verification.scores.divergence.mean
    assert found.divergence is not None and found.divergence.mean == pytest.approx(kl, rel=1e-4) and kl > 1e-4
    moved = shutil.copytree(llama, Path("elsewhere") / llama.name)
    change_config(base_model_name_or_path=llama.name)
    assert evaluated(str(moved)).divergence == found.divergence
    change_config(base_model_name_or_path=str(llama))
    assert (
        evaluated(str(shutil.copytree(save_tiny(tmp_path / "x", "llama"), Path("other") / llama.name))).model
        == "adapter"
    )
    # 2. Without it, with tensors of other modules, and with what is not LoRA
    change_config(base_model_name_or_path=llama.name)
    tensors = load_file("adapter/adapter_model.safetensors")
    save_file(
        {name.replace("layers.", "blocks."): t for name, t in tensors.items()}, "adapter/adapter_model.safetensors"
    )
    with raises("adapter-not-loadable"):
        evaluated(str(moved))
    with raises("adapter-only"):
        evaluated(None)
    change_config(peft_type="IA3")
    with raises("adapter-not-loadable"):
        evaluated(str(moved))


def test_a_relative_path_of_the_base_is_not_taken_for_a_name_on_the_hub(config: Path, llama: Path) -> None:
    shutil.copytree(llama, "models/tiny")
    do(config, Path("models/tiny"), "adapter", "export_format=lora")
    written = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (str(Path("models/tiny").absolute()), None)
    assert "base_model:" not in Path("adapter/README.md").read_text()
    shutil.rmtree("models")
    with raises("no-model-folder") as error:
        reproduce(Path("adapter"), None, reporter=NULL_REPORTER, stop=StopSignal())
    assert "--base" in str(error.value.fix)


def change_config(**changes: str) -> None:
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_a_rank_leaves_out_is_reported_and_less_with_a_higher_one(config: Path, llama: Path) -> None:
    errors = []
    for rank in (4, 32):
        export = do(config, llama, f"rank-{rank}", "export_format=lora", f"lora_rank={rank}").export
        assert export is not None
        written = json.loads(Path(f"rank-{rank}/manifest.json").read_text())["written"]
        errors.append((written["relative_error"], export.verification.divergence))
    assert errors[0][0] > 0.05 > errors[1][0] and errors[0][1] > errors[1][1]
    assert errors[1][0] < 1e-3 and errors[1][1] < 1e-5, "of full rank it is exact"
    assert f"{errors[0][0]:.1%}" in Path("rank-4/README.md").read_text()


def test_the_change_is_the_edit_and_its_error_is_what_is_left() -> None:
    torch.manual_seed(1)
    weight, v = torch.randn(40, 60), torch.nn.functional.normalize(torch.randn(40), dim=0)
    operator = norm_preserving(v, 1.1, weight_statistics(weight, v[None]), torch.ones(1))
    edited = TensorEdit(operator, is_bias=False, transposed=False)(weight)
    for rank in (1, 7, 64):
        change = low_rank_change(operator, weight, rank)
        left = edited - weight - change.b @ change.a
        assert change.a.shape[0] == change.b.shape[1] == min(rank, 40)
        assert float(left.square().sum()) == pytest.approx(change.left, abs=1e-4)
        best = torch.linalg.svdvals(edited - weight)[rank:].square().sum()
        assert float(left.square().sum()) <= 1.01 * float(best) + 1e-4, "no matrix of the rank is much nearer"
        assert (change.a.amax(1) >= -change.a.amin(1)).all(), "the sign of a pair is not left to chance"
    exact = low_rank_change(Operator(operator.u, operator.w), weight, 64)
    assert exact.a.shape[0] == 1 and exact.left == 0


def test_several_directions_are_a_change_of_that_rank() -> None:
    torch.manual_seed(1)
    weight, operator = torch.randn(40, 60), Operator(torch.randn(3, 40), torch.randn(3, 40))
    change = low_rank_change(operator, weight, 1)
    assert len(change.a) == 3 and change.left == 0
    assert torch.allclose(weight + change.b @ change.a, operator.on_weight(weight), atol=1e-3)
    assert change.size == pytest.approx(float((change.b @ change.a).square().sum()), rel=1e-3)


def test_a_rank_that_leaves_out_too_much_is_refused_in_words(
    config: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heretic.export.verify.TOLERATED_SHARE_OF_A_PART", 0.001)
    with raises("adapter-not-exact") as error:
        do(config, llama, "out", "export_format=lora", "lora_rank=1")
    assert "lora_rank" in str(error.value.fix) and not Path("out").exists()


def test_fused_experts_are_named(config: Path, tmp_path: Path) -> None:
    with raises("export-format-not-supported") as error:
        do(config, save_tiny(tmp_path / "m", "mixtral"), "out", "export_format=lora")
    assert error.value.fix == 'export_format = "full"' and not Path("out").exists()


def test_another_format_is_another_export(config: Path, llama: Path) -> None:
    do(config, llama, "out", "ablation.geometry=plain")
    assert Path("out/model.safetensors").is_file()
    do(config, llama, "out", "ablation.geometry=plain", "export_format=lora")
    assert Path("out/adapter_model.safetensors").is_file() and not Path("out/model.safetensors").exists()


def refused_by_vllm(folder: Path) -> list[str]:
    """What vLLM's loader raises for (vllm/lora/utils.py, vllm/lora/peft_helper.py, vllm/config/lora.py)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    names = list(load_file(folder / "adapter_model.safetensors"))
    suffixes = (".lora_A.weight", ".lora_B.weight")
    found = [name for name in names if not (name.startswith("base_model.model.") and name.endswith(suffixes))]
    found += [key for key in ("modules_to_save", "use_dora") if config[key]]
    return found + [key for key, good in (("bias", config["bias"] == "none"), ("r", config["r"] <= 512)) if not good]


def test_adapter_without_biases_is_one_that_vllm_loads(config: Path, tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        reporter = RecordingReporter()
        folder = save_tiny(tmp_path / family, family)
        resolved = resolve(
            config,
            {"model": str(folder), "save_to": family, "n_trials": 1},
            (*STRONG, "export_format=lora", "ablation.geometry=plain"),
        )
        run(resolved, reporter=reporter, stop=StopSignal())
        biased = bool(refused_by_vllm(Path(family)))
        assert biased == (family == "gpt2")
        assert any("vLLM" in text for text in reporter.warnings) == biased
        card = (Path(family) / "README.md").read_text()
        assert ("--max-lora-rank 1`" in card) != biased and str(tmp_path) not in card
