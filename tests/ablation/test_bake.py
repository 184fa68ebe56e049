"""Rewriting weights and putting them back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heretic.ablation.bake import copy_weights, read_from_checkpoint, rewritten_weights, sources
from heretic.ablation.operator import Operator
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from tests.helpers.errors import raises
from tests.tiny import save_tiny


def random_operators(names: list[str]) -> dict[str, Operator]:
    return {name: Operator(torch.randn(32), torch.randn(32), torch.rand(32)) for name in names}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("family", "stored"), [("llama", torch.bfloat16), ("gpt2", torch.float32)])
def test_after_twenty_trials_every_weight_is_the_checkpoints_bit_for_bit(
    cached: bool, family: str, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "m", family, dtype=stored, max_shard_size="20KB")
    checkpoint = open_checkpoint(str(folder))
    model = load(checkpoint, ["float32"], {})
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    writers = model.structure.writers
    original = copy_weights(writers) if cached else read_from_checkpoint(checkpoint, writers, model.model)
    for trial in range(20):
        chosen = [w.name for w in writers[trial % 3 :]]
        with rewritten_weights(writers, random_operators(chosen), original):
            assert not torch.equal(writers[-1].module.weight, before[f"{writers[-1].name}.weight"])
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_original_weights_are_not_read_from_a_quantized_checkpoint(llama: Path) -> None:
    model = load(open_checkpoint(str(llama)), ["float32"], {})
    with raises("weights-not-restorable"):
        read_from_checkpoint(
            replace(model.checkpoint, gguf_file="model.gguf"), model.structure.writers[:1], model.model
        )


def test_weights_are_put_back_after_an_error(llama: Path) -> None:
    model = load(open_checkpoint(str(llama)), ["float32"], {})
    writer = model.structure.writers[0]
    before = writer.weight().clone()
    with (
        pytest.raises(ZeroDivisionError),
        rewritten_weights([writer], random_operators([writer.name]), copy_weights([writer])),
    ):
        raise ZeroDivisionError
    assert torch.equal(writer.weight(), before)


def test_names_differ_by_an_outer_module_only(tmp_path: Path) -> None:
    model = load(open_checkpoint(str(save_tiny(tmp_path / "m", "gpt2"))), ["float32"], {})
    stored = sources(model.checkpoint, model.structure.writers, model.model)
    names = {ours: one for ours, found in stored.items() for one in found.names}
    assert len(names) == 16  # weight and bias of two writers in four layers
    assert all(
        ours.removeprefix("transformer.") == theirs.removeprefix("transformer.") for ours, theirs in names.items()
    )


def test_a_writer_without_a_tensor_is_an_error(llama: Path, tmp_path: Path) -> None:
    model = load(open_checkpoint(str(llama)), ["float32"], {})
    other = open_checkpoint(str(save_tiny(tmp_path / "m", "gpt2")))
    with raises("missing-tensors"):
        sources(other, model.structure.writers, model.model)
