"""Modules that read the residual stream through an RMS norm."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from heretic.model.architecture import find_residual_writers
from heretic.model.reader import reordered
from heretic.model.writer import ResidualWriter
from tests.helpers.errors import raises
from tests.tiny import COMMON, tiny_model

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


def test_other_blocks_have_readers_of_their_first_norm_and_of_the_others() -> None:
    readers = {reader.name.split(".", 3)[-1]: reader.component for reader in readers_of("lfm2")}
    first, others = {"conv.in_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"w1", "w3"}
    assert readers == dict.fromkeys(first, "attention_inputs") | {f"feed_forward.{n}": "mlp_inputs" for n in others}


def test_what_is_behind_an_inner_norm_is_a_writer_only() -> None:
    """BitNet's output projections read norms as wide as the stream."""
    config = transformers.BitNetConfig(**COMMON)
    structure = find_residual_writers(AutoModelForCausalLM.from_config(config).eval(), readers=True)
    names = [writer.name for writer in structure.writers]
    assert len(names) == len(set(names)) and sum(w.reads_stream for w in structure.writers) == 5 * 4


def test_a_norm_with_a_gate_has_no_readers() -> None:
    """Its output is not S x / rms(x), so the edit would be another one."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        norm = layer.input_layernorm
        norm.register_parameter("gate", torch.nn.Parameter(torch.randn(32)))
        plain = norm.forward
        norm.forward = lambda x, plain=plain, norm=norm: plain(x) * torch.sigmoid(norm.gate * x)
    readers = [w for w in find_residual_writers(model, readers=True).writers if w.reads_stream]
    assert {reader.name.split(".")[-1] for reader in readers} == {"gate_proj", "up_proj"}


def test_rows_that_gguf_files_reorder_are_named() -> None:
    def name(family: str) -> str:
        return reordered(find_residual_writers(tiny_model(family), readers=True).writers)

    assert [name(family) for family in ("llama", "phi3", "mixtral")] == ["", "", ""]
    assert name("granitemoehybrid").endswith("mamba.in_proj") and name("lfm2")


def test_weights_that_blocks_share_are_left_out() -> None:
    config = transformers.ZambaConfig(
        **{**COMMON, "num_key_value_heads": 4}, n_mamba_heads=2, mamba_d_state=8, use_mamba_kernels=False,
        layers_block_type=["mamba", "hybrid"] * 2,
    )  # fmt: skip
    structure = find_residual_writers(AutoModelForCausalLM.from_config(config).eval(), readers=True)
    readers = [writer for writer in structure.writers if writer.reads_stream]
    assert readers and not any("shared" in reader.name for reader in readers)


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
