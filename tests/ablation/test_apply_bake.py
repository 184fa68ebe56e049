"""Attaching an ablation and baking it into the weights are the same edit, in every family and geometry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.bake import copy_weights, rewritten_weights
from heretic.ablation.directions import Directions, normalized
from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.operator_factory import OperatorFactory
from heretic.ablation.strength_kernel import StrengthKernel
from heretic.model.architecture import find_residual_writers
from heretic.model.forward import trial_of_row
from heretic.model.transfer import Index
from tests.helpers.facts import factory_for
from tests.tiny import FAMILIES, tiny_model

TOKENS = torch.tensor([[5, 9, 17, 33, 41], [7, 8, 11, 60, 3]])


def random_directions(layers: int, width: int) -> Directions:
    torch.manual_seed(1)
    return Directions(torch.nn.functional.normalize(torch.randn(layers, width), dim=-1))


ABLATIONS = {
    "per layer": Ablation.from_kernels({c: StrengthKernel(1.2, 2.0, 0.4, 3.0) for c in ("attention", "mlp")}, 4),
    "between two layers": Ablation.from_kernels(
        {"attention": StrengthKernel(0.7, 3.0, 0.2, 2.0), "mlp": StrengthKernel(1.4, 1.0, 0.9, 2.5)}, 4, 1.3
    ),
    "one component only": Ablation.from_kernels(
        {"attention": StrengthKernel(0.0, 0, 0, 3), "mlp": StrengthKernel(1.0, 1.0, 1.0, 9.0)}, 4, 2.0
    ),
    "a mixture of all layers": Ablation(
        {"attention": (0.0, 0.5, 1.5, 0.2), "mlp": (0.0, 0.0, 0.3, 1.0)}, (1, -0.5, 2, 0)
    ),
    "neighbors": Ablation({"attention": (0.0, 0.5, 1.5, 0.2)}, None, shift=-0.4),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_attached_and_baked_logits_agree_and_differ_from_the_original(family: str, geometry: str) -> None:
    model = tiny_model(family)
    structure = find_residual_writers(model)
    operator_factory = factory_for(random_directions(4, 32), structure.writers, geometry)
    original = model(TOKENS).logits
    for name, ablation in ABLATIONS.items():
        operators = operator_factory.operators(ablation)
        with apply_operators(structure.writers, operators):
            attached = model(TOKENS).logits
        with rewritten_weights(structure.writers, operators, copy_weights(structure.writers)):
            baked = model(TOKENS).logits
        assert torch.allclose(attached, baked, atol=1e-4), f"{name}: {(attached - baked).abs().max()}"
        assert (attached - original).abs().max() > 0.01, name
        assert torch.equal(model(TOKENS).logits, original), f"{name}: something of the edit stayed behind"


@torch.no_grad()
def test_hooks_are_gone_after_an_error() -> None:
    model = tiny_model("llama")
    structure = find_residual_writers(model)
    operators = OperatorFactory.prepare(random_directions(4, 32), structure.writers, "plain").operators(
        ABLATIONS["per layer"]
    )
    original = model(TOKENS).logits
    with pytest.raises(ZeroDivisionError), apply_operators(structure.writers, operators):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS).logits, original)


@torch.no_grad()
def test_a_plain_operator_of_strength_one_removes_the_direction_from_the_write() -> None:
    model = tiny_model("qwen2")
    structure = find_residual_writers(model)
    directions = random_directions(4, 32)
    ablation = Ablation.from_kernels({"mlp": StrengthKernel(1.0, 1.0, 1.0, 9.0)}, 4, 2.0)
    operators = OperatorFactory.prepare(directions, structure.writers, "plain").operators(ablation)
    writer = next(w for w in structure.writers if w.component == "mlp" and w.layer == 1)
    written = []
    with apply_operators(structure.writers, operators):
        handle = writer.module.register_forward_hook(lambda _m, _i, output: written.append(output))
        model(TOKENS)
        handle.remove()
    along = written[0] @ directions.vectors[2]
    assert along.abs().max() < 1e-5
    assert written[0].norm(dim=-1).min() > 0.1


def test_norm_preserving_keeps_every_rows_norm() -> None:
    model = tiny_model("llama")
    structure = find_residual_writers(model)
    operator_factory = OperatorFactory.prepare(random_directions(4, 32), structure.writers, "norm_preserving")
    operators = operator_factory.operators(ABLATIONS["between two layers"])
    for writer in structure.writers:
        if writer.name in operators:
            before = writer.weight().float()
            after = operators[writer.name].on_weight(before)
            assert torch.allclose(after.norm(dim=1), before.norm(dim=1), rtol=1e-4)
            assert not torch.allclose(after, before, atol=1e-3)


def test_strength_zero_gives_no_operator_at_all() -> None:
    structure = find_residual_writers(tiny_model("llama"))
    operator_factory = OperatorFactory.prepare(random_directions(4, 32), structure.writers, "plain")
    operators = operator_factory.operators(ABLATIONS["one component only"])
    assert operators and all("mlp" in name for name in operators)
    kept = operator_factory.operators(ABLATIONS["one component only"], zeros_from=2)
    assert {w.name for w in structure.writers if w.layer >= 2} == set(kept), "for gradients, zeros too, from a layer on"


@torch.no_grad()
def test_writers_of_strength_zero_are_untouched_bit_for_bit() -> None:
    model = tiny_model("llama")
    structure = find_residual_writers(model)
    operator_factory = OperatorFactory.prepare(random_directions(4, 32), structure.writers, "norm_preserving")
    original = {n: p.clone() for n, p in model.named_parameters()}
    ablation = Ablation({"attention": (0.0, 0.0, 0.7, 0.0), "mlp": (0.0,) * 4}, (1.0, 0, 0, 0))
    with rewritten_weights(structure.writers, operator_factory.operators(ablation), copy_weights(structure.writers)):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, original[n])}
    assert changed == {
        next(w.name for w in structure.writers if w.component == "attention" and w.layer == 2) + ".weight"
    }


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2", "llama"])
@torch.no_grad()
def test_what_is_added_to_the_stream_has_nothing_along_the_direction(family: str) -> None:
    """Behind a norm the usual edit does not take the direction out of what is added; the norm-aware one does."""
    model = tiny_model(family)
    structure = find_residual_writers(model)
    directions = random_directions(4, 32)
    ablation = Ablation.from_kernels({"mlp": StrengthKernel(1.0, 1.0, 1.0, 9.0)}, 4, 2.0)
    writer = next(w for w in structure.writers if w.component == "mlp" and w.layer == 1)
    assert (not writer.norms) == (family == "llama")

    def added(norm_aware: bool) -> float:
        operators = OperatorFactory.prepare(directions, structure.writers, "plain", norm_aware=norm_aware).operators(
            ablation
        )
        written: list[torch.Tensor] = []
        with apply_operators(structure.writers, operators):
            module = writer.norms[0] if writer.norms else writer.module
            handle = module.register_forward_hook(lambda _m, _i, output: written.append(output))
            model(TOKENS)
            handle.remove()
        return float((written[0] @ directions.vectors[2]).abs().max() / written[0].norm(dim=-1).max())

    assert added(norm_aware=True) < 1e-5
    assert (added(norm_aware=False) > 1e-3) == (family != "llama")


@torch.no_grad()
def test_norm_aware_edits_keep_row_norms_and_bake_like_any_other() -> None:
    model = tiny_model("gemma3")
    structure = find_residual_writers(model)
    operator_factory = OperatorFactory.prepare(random_directions(4, 32), structure.writers, "norm_preserving")
    operators = operator_factory.operators(ABLATIONS["a mixture of all layers"])
    for writer in structure.writers:
        if writer.name in operators:
            before = writer.weight().float()
            assert torch.allclose(operators[writer.name].on_weight(before).norm(dim=1), before.norm(dim=1), rtol=1e-4)


def several(layers: int = 4, width: int = 32, count: int = 3) -> Directions:
    torch.manual_seed(1)
    return normalized(torch.randn(layers, count, width))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_several_directions_attached_and_baked_are_the_same_edit(family: str, geometry: str) -> None:
    model = tiny_model(family)
    structure = find_residual_writers(model)
    operator_factory = factory_for(several(), structure.writers, geometry)
    one = factory_for(Directions(several().vectors), structure.writers, geometry)
    vector = torch.randn(2 * 32, generator=torch.Generator().manual_seed(2))
    original = model(TOKENS).logits
    for name, ablation in (ABLATIONS | {"of its own": replace(ABLATIONS["neighbors"], vector=vector)}).items():
        operators = operator_factory.operators(ablation)
        with apply_operators(structure.writers, operators):
            attached = model(TOKENS).logits
        with rewritten_weights(structure.writers, operators, copy_weights(structure.writers)):
            baked = model(TOKENS).logits
        assert torch.allclose(attached, baked, atol=1e-4), f"{name}: {(attached - baked).abs().max()}"
        assert (attached - original).abs().max() > 0.01, name
        with apply_operators(structure.writers, one.operators(ablation)):
            assert name == "of its own" or (model(TOKENS).logits - attached).abs().max() > 1e-3, f"{name}: only one"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_several_directions_are_operators_one_after_the_other(family: str, geometry: str) -> None:
    """Nothing new is assumed of k directions: each alone, in any order, with the rows' norms given back at the end."""
    structure = find_residual_writers(tiny_model(family))
    directions = several()
    ablation = Ablation.from_kernels({c: StrengthKernel(1.2, 2.0, 0.4, 3.0) for c in ("attention", "mlp")}, 4)
    factory = factory_for(directions, structure.writers, geometry)
    operators = factory.operators(ablation)
    for writer in structure.writers:
        strength = float(ablation.strength(writer))
        if strength == 0:
            continue
        weight = writer.weight().double()
        rows = directions.all_directions[writer.layer].double()
        if (scale := writer.scale()) is not None:
            rows = torch.linalg.qr((rows * scale.double()).T).Q.T
        norms = torch.ones(32, 1, dtype=torch.float64)
        if GEOMETRIES[geometry].needs == "weight_stats":
            norms = weight.norm(dim=1, keepdim=True)
        edited = weight / norms
        for v in rows.flip(0):
            if geometry == "conditional":  # the map stays that of the original weight
                facts = factory.input_maps[writer.name].double()
                edited = edited - strength * torch.outer(v, v @ facts.outputs.mT @ facts.inputs)
            else:
                edited = edited - strength * torch.outer(v, v @ edited)
        edited = edited * norms
        if geometry == "norm_preserving":
            edited = edited * norms / edited.norm(dim=1, keepdim=True)
        assert torch.allclose(operators[writer.name].on_weight(writer.weight()).double(), edited, atol=1e-4)


@torch.no_grad()
def test_trials_with_several_directions_and_with_one_share_a_pass() -> None:
    model = tiny_model("llama")
    structure = find_residual_writers(model)
    operator_factory = OperatorFactory.prepare(several(), structure.writers, "norm_preserving")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    each = [
        operator_factory.operators(a) for a in (ABLATIONS["per layer"], replace(ABLATIONS["neighbors"], vector=vector))
    ]
    alone = []
    for operators in each:
        with apply_operators(structure.writers, operators):
            alone.append(model(TOKENS).logits)
    token = trial_of_row.set(Index([0, 1]))
    try:
        with apply_operators(structure.writers, *each):
            together = model(TOKENS).logits
    finally:
        trial_of_row.reset(token)
    assert torch.allclose(together[0], alone[0][0], atol=1e-5) and torch.allclose(together[1], alone[1][1], atol=1e-5)
