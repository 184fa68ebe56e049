"""What only a real GPU shows: its kernels, its allocator, bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heretic.interrupt import StopSignal
from heretic.model.batching import Batch, Batcher
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import decode
from heretic.model.loading import load
from heretic.model.turns import finish
from heretic.pipeline.run import Outcome, run
from heretic.progress import NullReporter
from heretic.settings.sources import resolve
from tests.tiny import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
FAMILIES = ("llama", "gemma3", "mixtral", "gpt2")


def study(config: Path, name: str, *more: str) -> Outcome:
    """A study of three trials in float32, with export."""
    assignments = (f"run_name={name}", "n_trials=3", f"save_to=out-{name}", 'dtypes=["float32"]', *more)
    return run(resolve(config, assignments=assignments), force=True, reporter=NullReporter(), stop=StopSignal())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_on_a_gpu_are_those_of_the_cpu(family: str, config: Path, tmp_path: Path) -> None:
    model = f'model="{save_tiny(tmp_path / family, family)}"'
    cpu = study(config, "cpu", model, 'device_map="cpu"')
    gpu = study(config, "gpu", model, 'device_map="cuda:0"')
    assert [r.scores.refusals for r in gpu.results] == [r.scores.refusals for r in cpu.results]
    for ours, reference in zip(gpu.results, cpu.results, strict=True):
        assert ours.scores.divergence.mean == pytest.approx(reference.scores.divergence.mean, rel=1e-3, abs=1e-5)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    free, _ = torch.cuda.mem_get_info()
    sizes: list[int] = []

    def step(batch: Batch) -> list[int]:
        sizes.append(len(batch.rows))
        taken = torch.empty(len(batch.rows) * free // 5, dtype=torch.uint8, device="cuda:0")
        return [taken.numel()] * len(batch.rows)

    results = Batcher(8, "cuda:0").run("Rows", [[1]] * 8, step)
    assert len(results) == 8 and sizes == [8, 4, 4]


def test_bitsandbytes_decodes_in_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = save_tiny(tmp_path / "model")
    model = load(open_checkpoint(str(folder)), ["bfloat16"], {"device_map": {"": "cuda:0"}}, quantization="bnb_4bit")
    batch = Batcher(2, model.device, pad=model.pad).batch([0, 1], [[5, 6, 7], [8, 9]])
    assert [len(tokens) for tokens in finish(decode(model.model, batch, 4, set()))] == [4, 4]
