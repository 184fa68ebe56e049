"""Modules that read the residual stream through an RMS norm."""

from __future__ import annotations

from collections import Counter

import pytest

from heretic.model.architecture import find_residual_writers
from heretic.model.writer import ResidualWriter
from tests.helpers.errors import raises
from tests.tiny import tiny_model

FIVE = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def readers_of(family: str) -> list[ResidualWriter]:
    structure = find_residual_writers(tiny_model(family), readers=True)
    return [writer for writer in structure.writers if writer.reads_stream]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", FIVE),
        ("qwen2", FIVE),
        ("gemma2", FIVE),
        ("gemma3", FIVE),
        ("phi3", {"qkv_proj", "gate_up_proj"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj"}),  # experts hold all matrices in one tensor; a router is none
    ],
)
def test_readers_are_found_in_every_layer(family: str, names: set[str]) -> None:
    readers = readers_of(family)
    assert {reader.name.split(".")[-1] for reader in readers} == names
    assert set(Counter(reader.layer for reader in readers).values()) == {len(names)}
    for reader in readers:
        scale = reader.scale()
        assert scale is not None and scale.shape == (32,)
        assert reader.component == ("attention_inputs" if "attn" in reader.name else "mlp_inputs")


def test_olmo2_reads_without_a_norm() -> None:
    """Its norms are behind the writers only."""
    with raises("architecture-not-supported"):
        find_residual_writers(tiny_model("olmo2"), readers=True)


def test_without_the_setting_there_are_writers_only() -> None:
    structure = find_residual_writers(tiny_model("llama"))
    assert structure.components == structure.writing_components == ("attention", "mlp")
    with_readers = find_residual_writers(tiny_model("llama"), readers=True)
    assert with_readers.components == ("attention", "mlp", "attention_inputs", "mlp_inputs")
    assert with_readers.writing_components == ("attention", "mlp")
