"""Sessions on models whose weights are not where they seem to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from heretic.ablation.ablation import Ablation, Workbench
from heretic.ablation.apply import attach
from heretic.ablation.bake import copies, rewrite
from heretic.ablation.directions import Directions
from heretic.ablation.strength_kernel import Kernel
from heretic.errors import UserError
from heretic.model.architecture import dissect
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.session.session import weight_reader
from tests.helpers.tiny import save_tiny

TOKENS = torch.tensor([[5, 9, 17, 33, 41]])
ABLATION = Ablation.of_kernels({c: Kernel(1.2, 2.0, 0.4, 3.0) for c in ("attention", "mlp")}, 4)


@torch.no_grad()
def test_offloaded_weights_are_read_from_the_checkpoint(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1))
    here = load(checkpoint, ["float32"], {})
    reference = Workbench.prepare(directions, here.anatomy.writers, "norm_preserving").operators(ABLATION)
    with attach(here.anatomy.writers, reference):
        expected = here.model(TOKENS).logits

    loaded = load(checkpoint, ["float32"], {})
    away: Any = loaded.model
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    writers = dissect(away).writers
    assert all(w.offloaded for w in writers)
    operators = Workbench.prepare(directions, writers, "norm_preserving", weight_reader(loaded)).operators(ABLATION)
    with attach(writers, operators):
        assert torch.allclose(away(TOKENS).logits, expected, atol=1e-5)
    free = Ablation(ABLATION.strengths, vector=tuple(directions.vectors[2].tolist()))  # a walk's, made where all fitted
    of_walk = Workbench.prepare(directions, writers, "norm_preserving", weight_reader(loaded)).operators(free)
    with attach(
        here.anatomy.writers, Workbench.prepare(directions, here.anatomy.writers, "norm_preserving").operators(free)
    ):
        expected = here.model(TOKENS).logits
    with attach(writers, of_walk):
        assert torch.allclose(away(TOKENS).logits, expected, atol=1e-5)
    with pytest.raises(UserError), rewrite(writers, operators, copies(writers)):
        pass


@torch.no_grad()
def test_offloaded_norms_are_asked_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "m", "gemma2")))
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1))
    here, loaded = load(checkpoint, ["float32"], {}), load(checkpoint, ["float32"], {})
    expected = Workbench.prepare(directions, here.anatomy.writers, "plain").scales
    away: Any = loaded.model
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    found = Workbench.prepare(directions, dissect(away).writers, "plain", weight_reader(loaded)).scales
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[name], scale) for name, scale in expected.items())
