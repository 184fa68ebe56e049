"""Quantized weights: what they multiply by, what operators make of it, and the study and exports on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.bake import rewritten_weights
from heretic.ablation.directions import Directions
from heretic.ablation.operator import Operator
from heretic.ablation.operator_factory import OperatorFactory
from heretic.errors import VerificationFailed
from heretic.export import full_precision_reference, save
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.model.quantization import dequantized, stored_bytes
from heretic.pipeline.reproduce import reproduce
from heretic.pipeline.run import Outcome, run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.helpers.facts import factory_for
from tests.tiny import COMMON, tiny_tokenizer

BOTH = pytest.mark.parametrize("name", ["bnb_4bit", "bnb_8bit"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a size that bitsandbytes quantizes well: on a CPU it does not where a weight has few blocks of 64."""
    path = tmp_path_factory.mktemp("models") / "wide-llama"
    torch.manual_seed(0)
    sizes = {**COMMON, "hidden_size": 128, "intermediate_size": 256}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def loaded(folder: Path, name: str = "none") -> LanguageModel:
    return load(open_checkpoint(str(folder)), ["float32"], {"device_map": {"": "cpu"}}, quantization=name)


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([[5, 20, 40, 33, 9]])).logits


@torch.no_grad()
def opened_up(model: LanguageModel, folder: Path, operators: Mapping[str, Operator]) -> LanguageModel:
    """The model in float32 with the weights that a quantized one multiplies by, and edits written into them."""
    found, modules = loaded(folder), dict(model.model.named_modules())
    for path, module in found.model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            weight = dequantized(modules[path]).float()
            module.weight.copy_(operators[path].on_weight(weight) if path in operators else weight)
    return found


@BOTH
def test_what_is_dequantized_is_what_is_multiplied_by(folder: Path, name: str) -> None:
    quantized, whole = loaded(folder, name), loaded(folder)
    assert [w.name for w in quantized.structure.writers] == [w.name for w in whole.structure.writers]
    logits(quantized)  # a first pass must not change the weights
    for a, b in zip(quantized.structure.writers, whole.structure.writers, strict=True):
        (part,) = a.parts
        assert part.quantized and part.shape == b.parts[0].shape == tuple(a.weight().shape)
        x = torch.randn(3, part.shape[1])
        expected = x @ a.weight().float().T
        assert (a.module(x) - expected).norm() < (0.02 if name == "bnb_8bit" else 1e-5) * expected.norm()
        assert (a.weight() - b.weight()).norm() < (0.01 if name == "bnb_8bit" else 0.12) * b.weight().norm()


def test_a_map_of_unknown_make_is_read_off_what_it_gives() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 1500, 4
            self.weight = nn.Parameter(torch.randint(-9, 9, (4, 1500), dtype=torch.int8), requires_grad=False)
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) / 8, self.bias)

    packed = Packed()
    assert torch.allclose(dequantized(packed), packed.weight.float() / 8, atol=1e-6)


@BOTH
@pytest.mark.parametrize("geometry", ["plain", "norm_preserving", "conditional"])
def test_operators_on_quantized_weights_are_their_edit(folder: Path, name: str, geometry: str) -> None:
    model = loaded(folder, name)
    directions = Directions(nn.functional.normalize(torch.randn(4, 128), dim=1))
    model_context = factory_for(directions, model.structure.writers, geometry)
    vector = nn.functional.normalize(torch.randn(128), dim=0).requires_grad_(True)
    strengths = {c: torch.full((4,), 0.9, requires_grad=True) for c in ("attention", "mlp")}
    operators = model_context.operators(Ablation(strengths, vector=vector), zeros_from=0)
    with apply_operators(model.structure.writers, operators):
        found = model.model(input_ids=torch.tensor([[5, 20, 40, 33, 9]])).logits
    slopes = torch.autograd.grad(found.square().mean(), [vector, *strengths.values()])
    assert all(s.isfinite().all() and s.abs().max() > 0 for s in slopes), "the gradient search needs these"
    # LLM.int8() rounds what it multiplies, too, so it is compared with what that makes of the unedited model.
    rounding = (logits(model) - logits(opened_up(model, folder, {}))).norm()
    off = (logits(opened_up(model, folder, operators)) - found).norm()
    moved = (logits(model) - found).norm()
    assert off < 2 * rounding < moved if name == "bnb_8bit" else off < 1e-3 * moved


def test_quantized_weights_are_not_rewritten(folder: Path) -> None:
    model = loaded(folder, "bnb_4bit")
    model_context = OperatorFactory.prepare(Directions(torch.eye(4, 128)), model.structure.writers, "plain")
    operators = model_context.operators(Ablation({"mlp": [1.0] * 4}))
    with (
        raises("weight-not-editable"),
        rewritten_weights(model.structure.writers, operators, lambda _: 1 / 0),
    ):
        pass


@BOTH
def test_the_plan_counts_what_is_loaded(folder: Path, name: str) -> None:
    model, fewer = loaded(folder, name), stored_bytes(loaded(folder).model, name)
    for path, module in model.model.named_modules():
        if f"{path}.weight" in fewer:
            weight = module.weight
            stored = weight.numel() * weight.element_size()
            if name == "bnb_4bit":
                state = weight.quant_state
                stored += state.absmax.numel() + 4 * state.state2.absmax.numel()
            else:
                stored += 4 * module.out_features
            counted = fewer[f"{path}.weight"] * module.in_features * module.out_features
            assert stored == pytest.approx(counted, rel=0.01)
        else:
            assert not hasattr(module, "weight") or module.weight.is_floating_point()


def do(config: Path, model: Path, save_to: str, *assignments: str) -> Outcome:
    options = {"model": str(model), "save_to": save_to, "n_trials": 2}
    return run(resolve(config, options, assignments), reporter=NULL_REPORTER, stop=StopSignal())


def test_one_missing_edit_is_seen_where_answers_could_not_show_it(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written model is compared quantized, with tolerance for that; a single writer's edit is left out."""
    monkeypatch.setattr(full_precision_reference, "full_precision_plan", lambda job: None)
    edited = save.TensorEdit.__call__
    left_out: list[object] = []

    def but_one(self: save.TensorEdit, tensor: torch.Tensor) -> torch.Tensor:
        left_out.append(self)
        return tensor if self is left_out[0] else edited(self, tensor)

    monkeypatch.setattr(save.TensorEdit, "__call__", but_one)
    weak = ("search.attention.max_weight=[0.2, 0.3]", "search.mlp.max_weight=[0.2, 0.3]", 'quantization="bnb_4bit"')
    with monkeypatch.context() as patched:
        patched.setattr("heretic.export.export.check_edits", lambda *_: 0)
        assert do(config, folder, "unseen", *weak).export is not None, "by its answers alone it would pass"
    left_out.clear()
    with raises("verification-failed", VerificationFailed) as error:
        do(config, folder, "seen", *weak, "run_name=seen")
    assert error.value.where in open_checkpoint(str(folder)).tensors, "a tensor is named"


def test_a_study_in_4_bits_is_exported_in_full_precision(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = 'quantization="bnb_4bit"'
    export = do(config, folder, "full", four).export
    assert export is not None and export.verification.divergence < 1e-5, "compared in full precision, the edit is exact"
    before, after = open_checkpoint(str(folder)), open_checkpoint("full")
    assert {n: (t.shape, t.dtype) for n, t in before.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in after.tensors.items()
    }
    untouched = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before.read(untouched), after.read(untouched))
    manifest = json.loads(Path("full/manifest.json").read_text())
    assert manifest["quantization"] == {"study": "bnb_4bit", "measured": "none"}
    card = " ".join(Path("full/README.md").read_text().split())
    assert "quantized to 4 bits" in card and "loaded in full precision" in card

    assert reproduce(Path("full"), None, reporter=NULL_REPORTER, stop=StopSignal()).verdict == "identical"

    export = do(config, folder, "adapter", four, "export_format=lora", "lora_rank=128").export
    assert export is not None and export.verification.divergence < 1e-4, "of the quantized model it is exact"
    assert (
        "It was computed for and measured on the base model quantized to 4 bits"
        in Path("adapter/README.md").read_text()
    )

    monkeypatch.setattr(full_precision_reference, "full_precision_plan", lambda job: None)
    do(config, folder, "again", four, "run_name=again")
    manifest = json.loads(Path("again/manifest.json").read_text())
    assert manifest["quantization"] == {"study": "bnb_4bit", "measured": "bnb_4bit"}
    assert "quantized in the same way" in " ".join(Path("again/README.md").read_text().split())
