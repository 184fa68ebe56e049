"""What the blocks of a spread model share: copied once to each GPU, from the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from heretic.model.batching import Batcher
from heretic.model.checkpoint import open_checkpoint
from heretic.model.forward import next_token_log_probs
from heretic.model.loading import load
from heretic.model.stages import stages_of
from heretic.model.transfer import Index
from tests.helpers.pretend_gpus import PretendGpus
from tests.helpers.spread import spread
from tests.tiny import save_tiny

SEQUENCES = [[5 + (i * 7 + j) % 80 for j in range(8 + i % 3)] for i in range(4)]


def test_offloaded_blocks_are_one_stage() -> None:
    blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    assert stages_of(blocks) == [torch.device("cpu")] == stages_of(blocks[:1])


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_masks_and_positions_travel_from_gpu_to_gpu_once(family: str, tmp_path: Path) -> None:
    """PyTorch's copy waits for both GPUs, so nothing may go from the first one to one that works on an earlier batch."""
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / family, family)))
    batch = Batcher(8).batch([0, 1, 2, 3], SEQUENCES)
    expected = next_token_log_probs(load(checkpoint, ["float32"], {}).model, batch)
    with PretendGpus(2) as gpus:
        model = load(checkpoint, ["float32"], {"device_map": spread(family, 2)})
        assert model.groups == 2
        gpus.reset()
        found = next_token_log_probs(model.model, Batcher(8, model.device).batch([0, 1, 2, 3], SEQUENCES))
        copies = {kind: n for kind, n in gpus.kinds["-"].items() if kind.startswith("copy 0>1")}
        assert copies == {"copy 0>1": 5}, "hidden states, a mask, position ids, cosines and sines"
        assert torch.allclose(found.cpu(), expected, atol=1e-5)


@pytest.mark.usefixtures("cuda")
def test_each_gpu_gets_the_trials_of_the_rows_once() -> None:
    with PretendGpus(2) as gpus:
        trials = Index([0, 1, 1])
        first = trials.on(torch.device("cuda:1"))
        assert trials.on(torch.device("cuda:1")) is first and first.tolist() == [0, 1, 1]
        assert gpus.kinds["-"]["copy cpu>1"] == 1 and not gpus.peer_bytes
