"""Input maps: which tokens give keys, what the maps do to known and to other inputs, and where they are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from heretic.ablation.geometries.conditional import conditional, input_map
from heretic.interrupt import StopSignal
from heretic.model.batching import Batcher
from heretic.model.checkpoint import open_checkpoint
from heretic.model.input_capture import writer_inputs
from heretic.model.loading import load
from heretic.pipeline import api
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.runs.folder import INPUT_MAPS
from heretic.session import input_maps
from heretic.session.input_maps import common_ending, groups, key_offsets
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.tiny import save_tiny, tiny_model

CONDITIONAL = ("ablation.geometry=conditional", "search.gradient.prompts=8")


def test_the_last_prompt_token_of_every_sequence_is_a_key_and_others_fill_the_rest() -> None:
    offsets = key_offsets([4, 0, 4], ending=3, most=9)
    assert all(answer + 1 in own for answer, own in zip([4, 0, 4], offsets, strict=True))
    assert sum(map(len, offsets)) == 9 and all(len(set(own)) == len(own) for own in offsets)
    assert max(offsets[0]) <= 7 and max(offsets[1]) <= 3, "template tokens before the last one, no word of the prompt"
    assert key_offsets([1], ending=0, most=9) == [[2, 1]]
    assert key_offsets([4, 0, 4], ending=3, most=9) == offsets


def test_the_common_ending_is_what_all_prompts_share() -> None:
    assert common_ending([[1, 2, 3, 9, 8], [4, 9, 8], [7, 3, 9, 8]]) == 2
    assert common_ending([[1, 2], [2, 1]]) == 0
    assert common_ending([[5, 2], [9, 5, 2]]) == 2


def test_a_map_keeps_the_output_on_harmful_keys_and_is_silent_on_benign_ones() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    harmful, benign = torch.randn(12, 64), torch.randn(30, 64)
    found = input_map(weight, harmful, benign)
    through = found.outputs.mT @ found.inputs
    y_h, y_b = harmful @ weight.mT, benign @ weight.mT
    assert (harmful @ through.mT - y_h).norm() < 0.2 * y_h.norm()
    assert (benign @ through.mT).norm() < 0.05 * y_b.norm()


def test_a_map_is_the_minimum_of_its_loss() -> None:
    """The gradient of the ridge regression vanishes; the formula is its dual form."""
    torch.manual_seed(0)
    weight, harmful, benign = torch.randn(8, 10), torch.randn(5, 10), 3 + torch.randn(7, 10)
    found = input_map(weight, harmful, benign).double()
    w, x_h, x_b = weight.double(), harmful.double(), benign.double()

    def loss(m: torch.Tensor) -> torch.Tensor:
        known = (x_h @ (m - w).mT).square().sum(-1).mean() + 20 * (x_b @ m.mT).square().sum(-1).mean()
        return known + 0.002 * x_h.square().sum(-1).mean() * m.square().sum()

    slope = torch.autograd.functional.jacobian(loss, found.outputs.mT @ found.inputs).norm()
    assert slope < 1e-4 * torch.autograd.functional.jacobian(loss, torch.zeros_like(w)).norm()


def test_an_operator_reads_the_inputs_in_float32_also_of_a_model_in_bfloat16() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 300), torch.randn(2, 3, 300).bfloat16()
    v = torch.nn.functional.normalize(torch.randn(8), dim=0)
    operator = conditional(v, 1.0, input_map(weight, torch.randn(20, 300), torch.randn(20, 300)), torch.ones(1))
    y = torch.zeros(2, 3, 8)
    assert torch.allclose(operator(y, x), -(x.float() @ operator.a)[..., None] * operator.u, atol=1e-5)


def test_inputs_are_those_of_the_modules_in_the_order_of_the_sequences(tmp_path: Path) -> None:
    model = load(open_checkpoint(str(save_tiny(tmp_path / "m", "qwen2"))), ["float32"], {})
    sequences, offsets = [[5, 9, 17], [7, 8, 11, 60, 3], [4, 6]], [[1, 3], [2], [1]]
    seen: dict[str, torch.Tensor] = {}
    writers = [w for w in model.structure.writers if w.layer in (1, 2)]
    found = writer_inputs(model, writers, "Inputs", sequences, offsets, Batcher(2))
    expected = []
    for sequence, own in zip(sequences, offsets, strict=True):
        handles = [
            w.module.register_forward_hook(lambda _m, i, _o, name=w.name: seen.update({name: i[0][0]}))  # type: ignore[misc]
            for w in writers
        ]
        model.model(input_ids=torch.tensor([sequence]))
        for handle in handles:
            handle.remove()
        expected += [{name: x[-offset] for name, x in seen.items()} for offset in own]
    assert found.keys() == {w.name for w in writers}
    for name, keys in found.items():
        assert torch.allclose(keys, torch.stack([row[name] for row in expected]), atol=1e-5)


def test_layers_are_taken_a_few_at_a_time_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    from heretic.model.architecture import find_residual_writers

    writers = find_residual_writers(tiny_model("llama")).writers
    assert [len(group) for group in groups(writers, 100, 32)] == [8]
    monkeypatch.setattr(input_maps, "MOST_CAPTURED", 4 * 100 * (32 + 32 + 48 + 32))
    assert [len(group) for group in groups(writers, 100, 32)] == [2, 2, 2, 2]
    monkeypatch.setattr(input_maps, "MOST_CAPTURED", 1)
    assert [len(group) for group in groups(writers, 100, 32)] == [1] * 8


def test_a_conditional_edit_is_exported_verified_resumed_and_made_again(
    config: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.pipeline.test_reproduce import again

    settings = (*CONDITIONAL, "search.start=gradient", "search.gradient.steps=3", "search.gradient.second_search=false")
    options = {"model": str(llama), "save_to": "out", "n_trials": 2, "run_name": "mine"}
    words = "refusal_markers=['sorry', 'bread', 'a', 'e', 'o']"
    full = run(resolve(config, options, (*settings, words)), reporter=NULL_REPORTER, stop=StopSignal()).export
    assert full is not None and full.verification.divergence < 1e-6 and full.verification.tensors_checked > 0
    assert Path("runs/mine", INPUT_MAPS).is_file()
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["operators"]["file"] == "heretic/operators.safetensors"
    made = again(Path("out"))
    assert made.verdict == "identical" and Path("again/heretic/operators.safetensors").is_file()
    monkeypatch.setattr(input_maps, "find_input_maps", None)  # the stored ones are used
    lora = {**options, "save_to": "adapter", "export_format": "lora"}
    adapter = run(resolve(config, lora, (*settings, words)), reporter=NULL_REPORTER, stop=StopSignal()).export
    assert adapter is not None and adapter.verification.divergence < 1e-6
    written = json.loads(Path("adapter/manifest.json").read_text())["written"]
    assert written["exact"] and written["rank"] == 1
    assert adapter.verification.scores.refusals == full.verification.scores.refusals


def test_custom_directions_keep_the_maps(config: Path) -> None:
    options = {"ablation": {"geometry": "conditional"}, "search": {"gradient": {"prompts": 8}}}
    with api.load(config=config, **options) as session:
        before = session.session.operator_factory.input_maps
        session.directions = torch.randn(session.num_layers, 32)
        ablation = session.ablation(attention=1.0, mlp=1.0)
        assert session.session.operator_factory.input_maps.keys() == before.keys() != set()
        operators = session.session.operator_factory.operators(ablation)
        assert all(operator.w is None and operator.a is not None for operator in operators.values())


def test_too_few_prompts_beside_those_of_the_gradient_search_are_refused_before_loading(config: Path) -> None:
    wanted = ("ablation.geometry=conditional", "search.start=gradient", "search.gradient.prompts=12")
    with raises("too-few-key-prompts") as error:
        run(resolve(config, {}, wanted), reporter=NULL_REPORTER, stop=StopSignal())
    assert "harmful_train" in error.value.what and not Path("runs").exists()
