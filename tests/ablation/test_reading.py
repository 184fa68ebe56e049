"""The edit of modules that read the stream: exact, the same attached and baked, with true gradients."""

from __future__ import annotations

import pytest
import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.bake import copy_weights, rewritten_weights
from heretic.ablation.directions import orthonormal
from heretic.ablation.operator_factory import OperatorFactory
from heretic.ablation.reading import reading_operator
from heretic.export.lora import low_rank_change
from heretic.model.architecture import find_residual_writers
from tests.ablation.test_apply_bake import TOKENS, random_directions
from tests.tiny import tiny_model

COMPONENTS = ("attention", "mlp", "attention_inputs", "mlp_inputs")
ALL = {component: (0.3, 0.0, 1.0, 0.6) for component in COMPONENTS}


def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [9, 6], two orthonormal directions [2, 6], a norm's weight [6]."""
    torch.manual_seed(0)
    directions = orthonormal(torch.randn(2, 6, dtype=torch.float64))[0]
    return torch.randn(9, 6, dtype=torch.float64), directions, torch.randn(6, dtype=torch.float64) + 2


def test_at_strength_one_nothing_along_the_direction_is_read() -> None:
    weight, directions, scale = parts()
    operator = reading_operator(directions, 1.0, scale, [weight])
    normed = torch.randn(5, 6, dtype=torch.float64)
    without = normed - (normed @ directions.mT) @ directions
    x = normed * scale
    assert torch.allclose(operator(x @ weight.mT, x), (without * scale) @ weight.mT)
    assert torch.allclose(x @ operator.on_weight(weight).mT.double(), (without * scale) @ weight.mT, atol=1e-5)
    bias = torch.randn(9)
    assert torch.equal(operator.on_bias(bias), bias), "a bias is not read from the stream"


def test_an_input_that_the_norm_blocks_gives_no_infinite_edit() -> None:
    weight, directions, scale = parts()
    scale[2] = 0.0
    operator = reading_operator(directions, 1.0, scale, [weight])
    assert operator.a is not None and operator.a.isfinite().all() and not operator.a[:, 2].any()


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_in_direction_and_strength(count: int) -> None:
    weight, directions, scale = parts()
    x = torch.randn(4, 6, dtype=torch.float64)

    def edited(v: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return reading_operator(v, strength, scale, [weight])(x @ weight.mT, x)

    v = directions[:count].squeeze(0).clone().requires_grad_()
    assert torch.autograd.gradcheck(edited, (v, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("geometry", ["plain", "norm_preserving"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3", "mixtral"])
@torch.no_grad()
def test_attached_and_baked_logits_agree(family: str, geometry: str) -> None:
    model = tiny_model(family)
    structure = find_residual_writers(model, readers=True)
    factory = OperatorFactory.prepare(random_directions(4, 32), structure.writers, geometry)
    vector = tuple(torch.randn(32, generator=torch.Generator().manual_seed(2)).tolist())
    original = model(TOKENS).logits
    for ablation in (Ablation(ALL), Ablation(ALL, vector=vector), Ablation({"mlp_inputs": (0.0, 0.0, 1.0, 0.0)})):
        operators = factory.operators(ablation)
        with apply_operators(structure.writers, operators):
            attached = model(TOKENS).logits
        with rewritten_weights(structure.writers, operators, copy_weights(structure.writers)):
            baked = model(TOKENS).logits
        assert torch.allclose(attached, baked, atol=2e-4), (attached - baked).abs().max()
        assert (attached - original).abs().max() > 0.005 or (family, len(operators)) == ("mixtral", 0)
        assert torch.equal(model(TOKENS).logits, original)


@torch.no_grad()
def test_strength_zero_gives_no_operator_and_a_lora_of_the_others_is_exact() -> None:
    structure = find_residual_writers(tiny_model("llama"), readers=True)
    factory = OperatorFactory.prepare(random_directions(4, 32), structure.writers, "plain")
    operators = factory.operators(Ablation({"attention_inputs": (0.0, 0.8, 0.0, 0.0)}))
    assert sorted(name.split(".")[-1] for name in operators) == ["k_proj", "q_proj", "v_proj"]
    for writer in structure.writers:
        if operator := operators.get(writer.name):
            weight = writer.weight()
            change = low_rank_change(operator, weight, 1)
            assert torch.allclose(weight + change.b @ change.a, operator.on_weight(weight), atol=1e-5)
