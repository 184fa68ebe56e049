"""Mixtures of experts and blocks of unlike kinds: every writer is found and edited as its weights would be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.bake import copy_weights, read_from_checkpoint, rewritten_weights
from heretic.ablation.directions import Directions
from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.operator import Operator
from heretic.export.save import plan_edits, write_weights
from heretic.interrupt import StopSignal
from heretic.model.architecture import ModelStructure, find_residual_writers
from heretic.model.batching import Batch, Batcher, EditSpec
from heretic.model.checkpoint import open_checkpoint
from heretic.model.forward import next_token_log_probs
from heretic.model.loading import load
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.facts import factory_for
from tests.tiny import MIXED, save_tiny, tiny_model, tiny_tokenizer

SEQUENCES = [[5, 9, 17, 33, 41], [7, 8, 11, 60, 3]]
TOKENS = torch.tensor(SEQUENCES)

WRITERS = {
    "mixtral": {"o_proj": 4, "experts": 4},
    "gpt_oss": {"o_proj": 4, "experts": 4},
    "llama4": {"o_proj": 4, "down_proj": 2, "feed_forward": 2},
    "deepseek_v3": {"o_proj": 4, "down_proj": 4, "experts": 3},  # the shared experts' are of their own
    "qwen3_next": {"o_proj": 2, "out_proj": 2, "down_proj": 4, "experts": 4},
    "granitemoehybrid": {"o_proj": 2, "out_proj": 2, "output_linear": 4, "experts": 4},
    "lfm2": {"out_proj": 4, "w2": 4},
}


def operators_of(structure: ModelStructure, geometry: str, strength: float = 1.1) -> dict[str, Operator]:
    torch.manual_seed(1)
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1))
    strengths = {c: [strength] * 4 for c in structure.components}
    return factory_for(directions, structure.writers, geometry).operators(Ablation(strengths, None, 0.4))


@pytest.mark.parametrize("family", MIXED)
@torch.no_grad()
def test_all_writers_are_found_and_exactly_they_are_edited(family: str) -> None:
    model = tiny_model(family)
    structure = find_residual_writers(model)
    assert Counter(w.name.rpartition(".")[2] for w in structure.writers) == WRITERS[family]
    assert structure.unrecognized == () and structure.incomplete == ()
    original = model(TOKENS).logits
    for geometry in GEOMETRIES:
        operators = operators_of(structure, geometry)
        with apply_operators(structure.writers, operators):
            attached = model(TOKENS).logits
        with rewritten_weights(structure.writers, operators, copy_weights(structure.writers)):
            baked = model(TOKENS).logits
        assert torch.allclose(attached, baked, atol=2e-4), (geometry, (attached - baked).abs().max())
        assert (attached - original).abs().max() > 0.01
        assert torch.equal(model(TOKENS).logits, original)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "deepseek_v3", "qwen3_next"])
@torch.no_grad()
def test_the_written_folder_gives_what_the_attached_model_gave(family: str, tmp_path: Path) -> None:
    """Checkpoints of some families hold a tensor an expert, others one for all."""
    model = load(open_checkpoint(str(save_tiny(tmp_path / "m", family))), ["float32"], {})
    writers = model.structure.writers
    operators = operators_of(model.structure, "norm_preserving")
    before = {p.name: p.tensor.clone() for w in writers for p in w.parts}
    with rewritten_weights(writers, operators, read_from_checkpoint(model.checkpoint, writers, model.model)):
        baked = model.model(TOKENS).logits
    assert all(torch.equal(p.tensor, before[p.name]) for w in writers for p in w.parts)
    (tmp_path / "out").mkdir()
    write_weights(
        model.checkpoint,
        plan_edits(model.checkpoint, writers, operators, model.model),
        tmp_path / "out",
        NULL_REPORTER,
        StopSignal(),
    )
    written = load(open_checkpoint(str(tmp_path / "out")), ["float32"], {})
    assert torch.allclose(written.model(TOKENS).logits, baked, atol=1e-5)
    assert tiny_tokenizer().chat_template == written.tokenizer.chat_template


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "granitemoehybrid"])
@torch.no_grad()
def test_each_row_has_the_edit_of_its_own_trial(family: str) -> None:
    model = tiny_model(family)
    structure = find_residual_writers(model)
    both = [operators_of(structure, "plain"), operators_of(structure, "norm_preserving", 0.5)]
    made = Batcher(4).batch([0, 1, 1], SEQUENCES)
    batch = Batch([0, 1, 1], made.input_ids, made.attention_mask, None, torch.tensor([1, 0, 1]), EditSpec(2))
    with apply_operators(structure.writers, *both):
        together = next_token_log_probs(model, batch)
    for row, (trial, sequence) in enumerate([(1, 0), (0, 1), (1, 1)]):
        with apply_operators(structure.writers, both[trial]):
            alone = next_token_log_probs(model, Batcher(1).batch([sequence], SEQUENCES))
        assert torch.allclose(together[row], alone[0], atol=1e-4)


@torch.no_grad()
def test_the_experts_are_one_matrix_and_keep_its_norms() -> None:
    structure = find_residual_writers(tiny_model("gpt_oss"))
    writer = next(w for w in structure.writers if w.mixture)
    assert writer.weight().shape == (32, 4 * 48) and len(writer.weights()) == 4
    operator = operators_of(structure, "norm_preserving")[writer.name]
    edited = operator.on_weight(writer.weight())
    assert torch.allclose(edited.norm(dim=1), writer.weight().norm(dim=1), rtol=1e-4)
    assert not torch.allclose(edited, writer.weight(), atol=1e-3)


def test_experts_that_hand_on_their_input_are_left_alone_and_named() -> None:
    """What comes out of such a mixture is not all made by its weights."""
    model = tiny_model("mixtral")
    experts = model.model.layers[2].mlp.experts
    handing_on = experts.forward
    experts.forward = lambda hidden, *rest: handing_on(hidden, *rest) + 0.5 * hidden
    structure = find_residual_writers(model)
    assert structure.unrecognized == tuple(f"model.layers.{i}.mlp.experts" for i in range(4)), (
        "of the others it is not known"
    )
    assert len(structure.incomplete) == 4 and structure.components == ("attention",)


def test_something_else_that_is_added_to_the_stream_is_noticed() -> None:
    model = tiny_model("llama")

    class Adds(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.strange = inner, nn.Linear(32, 32)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden) + self.strange(hidden)

    model.model.layers[1].mlp = Adds(model.model.layers[1].mlp)
    assert find_residual_writers(model).incomplete == ("model.layers.1",)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next"])
def test_a_whole_run_descends_decodes_and_writes(family: str, config: Path, tmp_path: Path) -> None:
    """Gradients pass the experts and the recurrence; the caches of linear attention cannot be cut."""
    settings = {"model": str(save_tiny(tmp_path / "m", family)), "save_to": "out", "n_trials": 2}
    outcome = run(resolve(config, settings, ['search.start="gradient"']), reporter=NULL_REPORTER, stop=StopSignal())
    assert outcome.export is not None and outcome.export.verification.divergence < 1e-4
    assert any(r.params for r in outcome.results)


@torch.no_grad()
def test_a_weight_that_two_blocks_share_has_one_edit() -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    structure = find_residual_writers(model)
    assert [w.layer for w in structure.writers if w.component == "mlp"] == [0, 1, 2] and structure.incomplete == ()
    operators = operators_of(structure, "row_normalized")
    with apply_operators(structure.writers, operators):
        attached = model(TOKENS).logits
    with rewritten_weights(structure.writers, operators, copy_weights(structure.writers)):
        assert torch.allclose(model(TOKENS).logits, attached, atol=1e-4)


def test_what_only_feeds_a_writer_is_none_itself() -> None:
    model = tiny_model("llama")
    inner = model.model.layers[1].mlp.down_proj

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj, self.fc2 = inner, nn.Linear(48, 32)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.down_proj(hidden) * self.fc2(hidden).sigmoid()

    model.model.layers[1].mlp.down_proj = Gated()
    structure = find_residual_writers(model)
    assert structure.unrecognized == ("model.layers.1.mlp.down_proj.fc2",)
    assert "model.layers.1.mlp.down_proj.down_proj" in {w.name for w in structure.writers}
