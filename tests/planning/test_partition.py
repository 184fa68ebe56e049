"""The partition of a model's blocks over several GPUs."""

from __future__ import annotations

from collections import Counter
from itertools import combinations_with_replacement
from typing import Any

import pytest
from accelerate.utils import find_tied_parameters
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma3nTextConfig,
    Gemma4TextConfig,
    Lfm2Config,
    OlmoConfig,
    PretrainedConfig,
    RobertaConfig,
    Zamba2Config,
)

from heretic.model.meta_model import meta_model
from heretic.planning.partition import _counts, partitions
from heretic.planning.placement import lookup, shares
from tests.helpers.shapes import GIB, checkpoint_of, gpus, qwen_32b, small
from tests.helpers.spread import spread
from tests.tiny import FAMILIES, MIXED, tiny_model


def partition(*asked: Any) -> dict[str, int | str] | None:
    """The most even table."""
    return next(iter(partitions(*asked)), None)


def table_of(config: PretrainedConfig, *gib: float) -> dict[str, int | str] | None:
    """Devices by module for GPUs with so many GiB for weights."""
    devices = gpus(len(gib), 24)
    room = {device.name: int(size * GIB) for device, size in zip(devices, gib, strict=True)}
    return partition(meta_model(checkpoint_of(config), "bfloat16"), config.num_hidden_layers, room, devices)


def counts(config: PretrainedConfig, *gib: float) -> list[int] | None:
    """Blocks on each GPU."""
    table = table_of(config, *gib)
    cards = [card for name, card in (table or {}).items() if ".layers." in name]
    return [cards.count(card) for card in range(len(gib))] if table else None


def test_32b_is_spread_evenly() -> None:
    assert counts(qwen_32b(), 20, 20, 20, 20) == [15, 17, 17, 15]
    table = table_of(qwen_32b(), 20, 20, 20, 20)
    assert table is not None
    assert (table["model.embed_tokens"], table["model.rotary_emb"]) == (0, 0), "positions are computed on the first GPU"
    assert (table["model.norm"], table["lm_head"]) == (3, 3)


def test_gpu_without_room_is_left_out() -> None:
    assert counts(qwen_32b(), 0, 30, 30, 30) == [0, 21, 22, 21]
    assert counts(qwen_32b(), 30, 30, 0, 30) == [21, 22, 0, 21]
    assert counts(qwen_32b(), 10, 24, 24, 24) == [9, 19, 19, 17]
    assert counts(qwen_32b(), 14, 14, 14, 14) is None


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_has_a_place(tied: bool) -> None:
    model = meta_model(checkpoint_of(small(tie_word_embeddings=tied)), "bfloat16")
    devices = gpus(3, 24)
    table = partition(model, 6, {device.name: GIB for device in devices}, devices)
    assert table is not None
    placed = shares(model, table, 6)
    assert Counter(n for share in placed.values() for n in share.blocks) == Counter(range(6))
    assert placed[0].embedding and placed[0 if tied else 2].head and "disk" not in placed


def test_a_head_of_several_layers_stays_with_the_embedding_whose_weight_it_shares() -> None:
    config = RobertaConfig(is_decoder=True, num_hidden_layers=4, vocab_size=5000)
    model, devices = meta_model(checkpoint_of(config), "bfloat16"), gpus(2, 24)
    table = partition(model, 4, {device.name: GIB for device in devices}, devices)
    assert table is not None and table["lm_head"] == lookup(table, "roberta.embeddings.word_embeddings") == 0
    assert not [group for group in find_tied_parameters(model) if len({lookup(table, name) for name in group}) > 1]


def test_modules_lie_where_they_run() -> None:
    sizes = dict(num_hidden_layers=4, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=500)
    without_weights = table_of(OlmoConfig(**sizes), 1, 1)
    assert without_weights is not None and without_weights["model.norm"] == 1
    assert without_weights["model.rotary_emb"] == 0
    per_layer = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=500, num_key_value_heads=2)
    late = table_of(Gemma4TextConfig(**sizes, **per_layer), 1, 1)  # registered after the blocks, read before them
    listed = table_of(Gemma3nTextConfig(**sizes, **per_layer, num_kv_shared_layers=0, laurel_rank=4, head_dim=16), 1, 1)
    assert (
        listed is not None and listed["model.altup_projections"] == 0 and listed["model.altup_unembed_projections"] == 1
    )
    assert late is not None and late["model.embed_tokens_per_layer"] == late["model.per_layer_projection_norm"] == 0
    assert late["model.norm"] == 1
    reading = table_of(Lfm2Config(**sizes), 1, 1)  # its pass looks at the mask, which has no values on the meta device
    assert reading is not None and (reading["model.rotary_emb"], reading["model.embedding_norm"]) == (0, 1)


def test_blocks_that_share_a_weight_are_left_to_accelerate() -> None:
    kinds = ["mamba", "hybrid"] * 3
    config = Zamba2Config(
        num_hidden_layers=6, hidden_size=64, vocab_size=500, num_attention_heads=4, n_mamba_heads=8, mamba_headdim=16,
        intermediate_size=64, num_mem_blocks=1, layers_block_type=kinds, use_mamba_kernels=False,
    )  # fmt: skip
    model, devices = meta_model(checkpoint_of(config), "bfloat16"), gpus(2, 24)
    assert partition(model, 6, {device.name: GIB for device in devices}, devices) is None


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.lists(st.integers(0, 30), min_size=1, max_size=4),
)
def test_no_other_partition_is_better(blocks: list[int], ends: tuple[int, int], room: list[int]) -> None:
    def loads(stops: tuple[int, ...]) -> list[int]:
        parts = zip((0, *stops), (*stops, len(blocks)), strict=True)
        return [sum(blocks[a:b]) + (b > a) * (ends[0] * (a == 0) + ends[1] * (b == len(blocks))) for a, b in parts]

    possible = combinations_with_replacement(range(len(blocks) + 1), len(room) - 1)
    fitting = [each for each in map(loads, possible) if all(x <= y for x, y in zip(each, room, strict=True))]
    found = _counts(blocks, ends, room)
    if not fitting:
        assert found is None
        return
    assert found is not None and sum(found) == len(blocks)
    stops = tuple(sum(found[: n + 1]) for n in range(len(room) - 1))
    assert max(loads(stops)) == min(max(each) for each in fitting)  # the sum of squares is nearly the smallest


@pytest.mark.parametrize("family", [*FAMILIES, *MIXED])
def test_every_family_lies_as_its_blocks_run(family: str) -> None:
    model, devices = tiny_model(family), gpus(4, 24)
    table, by_hand = partition(model, 4, {device.name: GIB for device in devices}, devices), spread(family)
    assert table is not None
    names = [name for name, module in model.named_modules() if not list(module.children())]
    of_blocks = [name for name in names if any(part.isdigit() for part in name.split("."))]
    assert sorted({lookup(table, name) for name in of_blocks}) == sorted({lookup(table, n) for n in names})
    ends = [name for name in names if name not in of_blocks and lookup(by_hand, name) is not None]
    last = max(int(lookup(table, name)) for name in names)
    for name in ends:
        assert lookup(table, name) == (0 if lookup(by_hand, name) == 0 else last), name
