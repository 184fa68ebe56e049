"""Residuals captured block by block are those of whole passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import heretic.model.block_capture as capturing
from heretic.model.batching import Batcher
from heretic.model.block_capture import mean_residuals_by_block
from heretic.model.block_loading import load_by_block
from heretic.model.capture import mean_residuals
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.progress import NULL_REPORTER
from tests.helpers.errors import raises
from tests.helpers.pretend_gpus import PretendGpus
from tests.tiny import save_tiny

SETS = (
    [[5, 9, 17], [7, 8, 11, 60, 3], [40, 4], [21, 22], [33, 34, 35, 36, 3]],
    [[9, 8, 7], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]],
)


def by_block(folder: Path) -> LanguageModel:
    return load_by_block(open_checkpoint(str(folder)), "float32", torch.device("cpu"), reporter=NULL_REPORTER)


def batcher(size: int = 2) -> Batcher:
    return Batcher(size, equal_lengths=True)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt2", "lfm2"])
def test_means_are_those_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    whole = load(open_checkpoint(str(save_tiny(tmp_path / "m", family))), ["float32"], {})
    found = mean_residuals_by_block(by_block(tmp_path / "m"), SETS, batcher(), 0.9, keep_each=True)
    for own, sequences in zip(found, SETS, strict=True):
        expected = mean_residuals(whole, "", sequences, Batcher(1), 0.9, keep_each=True)
        assert own.count == len(sequences) and torch.allclose(own.mean, expected.mean, atol=1e-5)
        assert torch.allclose(own.require_per_prompt, expected.require_per_prompt, atol=1e-5)


def test_all_prompts_need_one_read_and_the_check_another(llama: Path) -> None:
    model = by_block(llama)
    assert model.loader is not None
    before = model.loader.bytes_read
    mean_residuals_by_block(model, SETS, batcher(1))
    blocks = sum(p.numel() * 4 for block in model.structure.blocks for p in block.parameters() if p.ndim > 1)
    assert model.loader.bytes_read - before == 2 * blocks


def test_short_memory_halves_the_batches_and_starts_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = by_block(llama), capturing._run_block
    failed = []

    def short(language_model: LanguageModel, layer: int, stream: capturing._Stream) -> None:
        if layer == 2 and len(stream.batch.rows) > 1:
            failed.append(layer)
            raise MemoryError
        run(language_model, layer, stream)

    expected = mean_residuals_by_block(model, SETS, batcher())
    monkeypatch.setattr(capturing, "_run_block", short)
    small = batcher()
    found = mean_residuals_by_block(model, SETS, small)
    assert failed == [2] and small.size == 1
    assert all(torch.allclose(a.mean, b.mean, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_hidden_states_that_do_not_fit_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "memory", lambda: (2**12, 2**12))
    with raises("insufficient-ram"):
        mean_residuals_by_block(by_block(llama), SETS, batcher())


def test_blocks_that_depend_on_more_than_the_hidden_states_are_refused(llama: Path) -> None:
    model = by_block(llama)
    seen: list[torch.Tensor] = []

    def add_first(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + seen[0]  # of block 0 in the same pass

    def remember(_module: object, _inputs: object, output: torch.Tensor) -> None:
        seen[:] = [output]

    model.structure.blocks[0].register_forward_hook(remember)
    model.structure.blocks[3].register_forward_hook(add_first)
    with raises("not-by-block"):
        mean_residuals_by_block(model, SETS, batcher())


@pytest.mark.usefixtures("cuda")
def test_a_gpu_holds_one_block_and_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # pretend GPUs are those of one thread
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "m", "mixtral")))
    expected = mean_residuals_by_block(by_block(tmp_path / "m"), SETS, batcher())
    with PretendGpus(1) as gpus:
        model = load_by_block(checkpoint, "float32", torch.device("cuda:0"), reporter=NULL_REPORTER)
        found = mean_residuals_by_block(model, SETS, replace(batcher(), device="cuda:0"))
        used = gpus.used[0]
    assert all(torch.allclose(a.mean, b.mean, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert used < 0.5 * checkpoint.nbytes
