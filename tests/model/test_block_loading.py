"""A model that is read block by block is the one that is loaded whole, with one block in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heretic.model.block_loading import BlockLoader, load_by_block
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.progress import NULL_REPORTER
from tests.helpers.errors import raises
from tests.tiny import save_tiny

TOKENS = torch.tensor([[5, 9, 17, 40, 3]])
CPU = torch.device("cpu")


def by_block(folder: Path) -> LanguageModel:
    return load_by_block(open_checkpoint(str(folder)), "float32", CPU, reporter=NULL_REPORTER)


def loader_of(model: LanguageModel) -> BlockLoader:
    assert model.loader is not None
    return model.loader


def matrices_in_memory(model: LanguageModel) -> list[int]:
    """The blocks with a matrix in memory."""
    blocks = enumerate(model.structure.blocks)
    return [layer for layer, block in blocks if any(p.ndim > 1 and not p.is_meta for p in block.parameters())]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt_oss", "gpt2", "qwen3_next"])
@torch.inference_mode()
def test_logits_and_writers_are_those_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    whole = load(open_checkpoint(str(save_tiny(tmp_path / "m", family))), ["float32"], {})
    model = by_block(tmp_path / "m")
    assert torch.equal(model.model(TOKENS).logits, whole.model(TOKENS).logits)
    writers = [[(w.name, len(w.parts), len(w.norms)) for w in m.structure.writers] for m in (model, whole)]
    assert writers[0] == writers[1] and model.structure.unrecognized == whole.structure.unrecognized


def test_one_block_is_in_memory_and_each_pass_reads_every_block_once(llama: Path) -> None:
    model = by_block(llama)
    loader, peak = loader_of(model), 0

    def count(*_: object) -> None:
        nonlocal peak
        peak = max(peak, len(matrices_in_memory(model)))

    for block in model.structure.blocks:
        block.register_forward_hook(count)
    before = loader.bytes_read
    with torch.inference_mode():
        model.model(TOKENS)
    blocks = sum(p.numel() * 4 for block in model.structure.blocks for p in block.parameters() if p.ndim > 1)
    assert (peak, matrices_in_memory(model)) == (1, [3])
    assert loader.bytes_read - before == blocks


def test_a_block_that_cannot_be_read_leaves_nothing_behind(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = by_block(llama)

    def full(_name: str) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(type(model.checkpoint), "slice_of", lambda _self, name: full(name))
        with pytest.raises(MemoryError):
            loader_of(model).load(0)
    assert matrices_in_memory(model) == []
    loader_of(model).load(0)
    assert matrices_in_memory(model) == [0]


def test_pickle_files_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with raises("not-by-block"):
        load_by_block(open_checkpoint(str(folder), allow_pickle=True), "float32", CPU, reporter=NULL_REPORTER)


def test_missing_tensors_of_a_block_are_named(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = {n: t for n, t in checkpoint.tensors.items() if n != name}
    object.__setattr__(checkpoint, "tensors", tensors)
    with raises("missing-tensors") as refused:
        load_by_block(checkpoint, "float32", CPU, reporter=NULL_REPORTER)
    assert name in str(refused.value)
