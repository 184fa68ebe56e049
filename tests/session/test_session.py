"""Sessions on models whose weights are not where they seem to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.bake import copy_weights, rewritten_weights
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.ablation.strength_kernel import StrengthKernel
from heretic.errors import UserError
from heretic.model.architecture import find_residual_writers
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.session.session import weight_reader
from tests.tiny import save_tiny

TOKENS = torch.tensor([[5, 9, 17, 33, 41]])
ABLATION = Ablation.from_kernels({c: StrengthKernel(1.2, 2.0, 0.4, 3.0) for c in ("attention", "mlp")}, 4)


@torch.no_grad()
def test_offloaded_weights_are_read_from_the_checkpoint(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1))
    here = load(checkpoint, ["float32"], {})
    reference = OperatorFactory.prepare(directions, here.structure.writers, "norm_preserving").operators(ABLATION)
    with apply_operators(here.structure.writers, reference):
        expected = here.model(TOKENS).logits

    loaded = load(checkpoint, ["float32"], {})
    away: Any = loaded.model
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    writers = find_residual_writers(away).writers
    assert all(w.offloaded for w in writers)
    operators = OperatorFactory.prepare(directions, writers, "norm_preserving", weight_reader(loaded)).operators(
        ABLATION
    )
    with apply_operators(writers, operators):
        assert torch.allclose(away(TOKENS).logits, expected, atol=1e-5)
    free = Ablation(
        ABLATION.strengths, vector=tuple(directions.vectors[2].tolist())
    )  # a gradient path's, made where all fitted
    of_walk = OperatorFactory.prepare(directions, writers, "norm_preserving", weight_reader(loaded)).operators(free)
    with apply_operators(
        here.structure.writers,
        OperatorFactory.prepare(directions, here.structure.writers, "norm_preserving").operators(free),
    ):
        expected = here.model(TOKENS).logits
    with apply_operators(writers, of_walk):
        assert torch.allclose(away(TOKENS).logits, expected, atol=1e-5)
    with pytest.raises(UserError), rewritten_weights(writers, operators, copy_weights(writers)):
        pass


@torch.no_grad()
def test_offloaded_norms_are_asked_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "m", "gemma2")))
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1))
    here, loaded = load(checkpoint, ["float32"], {}), load(checkpoint, ["float32"], {})
    expected = OperatorFactory.prepare(directions, here.structure.writers, "plain").scales
    away: Any = loaded.model
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    found = OperatorFactory.prepare(
        directions, find_residual_writers(away).writers, "plain", weight_reader(loaded)
    ).scales
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[name], scale) for name, scale in expected.items())
