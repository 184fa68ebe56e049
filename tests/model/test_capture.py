"""Captured residuals are the hidden states, and their means are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heretic.model.batching import Batcher
from heretic.model.capture import last_token_residuals, mean_residuals
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.model.turns import finish
from tests.tiny import FAMILIES, save_tiny

SEQUENCES = [[5, 9, 17], [7, 8, 11, 60, 3], [40], [21, 22], [33, 34, 35, 36]]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_residuals_are_what_the_model_reports(family: str, tmp_path: Path) -> None:
    model = load(open_checkpoint(str(save_tiny(tmp_path / "m", family))), ["float32"], {})
    batch = Batcher(8).batch(list(range(5)), SEQUENCES)
    found = finish(last_token_residuals(model, batch))
    for row, tokens in enumerate(SEQUENCES):
        states = model.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        for layer in range(3):  # the last of hidden_states has passed the final norm
            assert torch.allclose(found[row, layer], states[layer + 1][0, -1], atol=1e-4), (row, layer)


def test_means_do_not_depend_on_the_batch_and_winsorising_clips(llama: Path) -> None:
    model = load(open_checkpoint(str(llama)), ["float32"], {})
    one, many = (mean_residuals(model, "", SEQUENCES, Batcher(size)) for size in (1, 5))
    assert one.mean.dtype == torch.float64 and one.count == 5
    assert torch.allclose(one.mean, many.mean, atol=1e-6)
    clipped = mean_residuals(model, "", SEQUENCES, Batcher(5), winsorize=0.9)
    assert clipped.mean.abs().max() < one.mean.abs().max()
