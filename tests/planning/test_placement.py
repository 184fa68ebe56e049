"""Devices by name, limits in bytes, and where modules go."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import PretrainedConfig

from heretic.hardware.devices import Device
from heretic.model.meta_model import meta_model
from heretic.planning.placement import device_named, infer_device_map, shares, weight_limits
from tests.helpers.errors import raises
from tests.helpers.shapes import GIB, checkpoint_of, cpu, gpus, small

DEVICES = [*gpus(2, 24), cpu(64)]


@pytest.mark.parametrize(
    ("value", "name"), [(0, "cuda:0"), ("1", "cuda:1"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("CPU", "cpu")]
)
def test_device_named(value: int | str, name: str) -> None:
    assert device_named(value, DEVICES, "device_map").name == name


@pytest.mark.parametrize("value", ["cuda:3", 2, "disk", "mps", "", "-1"])
def test_device_that_is_not_there(value: int | str) -> None:
    with raises("device-not-there") as error:
        device_named(value, DEVICES, "max_memory")
    assert error.value.where == "max_memory" and "cuda:0, cuda:1, cpu" in str(error.value.fix)


@pytest.mark.parametrize("mode", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_accelerate_places_on_gpus_whose_numbers_have_gaps(mode: str) -> None:
    model = meta_model(checkpoint_of(small(num_hidden_layers=12)), "bfloat16")
    share = sum(p.numel() * p.element_size() for p in model.parameters()) * 2 // 3
    placed = {}
    for numbers in ((0, 1), (1, 3)):
        left = [Device(f"cuda:{number}", GIB, GIB) for number in numbers]
        table = infer_device_map(model, mode, {device.name: share for device in left} | {"cpu": GIB}, [*left, cpu(64)])
        placed[numbers] = table
    renamed = {name: {0: 1, 1: 3}.get(place, place) for name, place in placed[0, 1].items()}
    assert placed[1, 3] == renamed and {1, 3} <= set(renamed.values())


def test_weight_limits() -> None:
    assert weight_limits({"0": "20GiB", "cpu": "1GB"}, DEVICES) == {"cuda:0": 20 * GIB, "cpu": 10**9}
    with raises("invalid-size") as error:
        weight_limits({"0": "20 apples"}, DEVICES)
    assert error.value.where == "max_memory.0" and "20 apples" in error.value.what
    with raises("device-not-there") as error:
        weight_limits({"7": "1GiB"}, DEVICES)
    assert "'7'" in error.value.what


def test_skeleton_takes_no_memory_and_keeps_ties() -> None:
    model = meta_model(checkpoint_of(small()), "float16")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert str(model.dtype) == "torch.float16" and model.lm_head.weight is model.model.embed_tokens.weight


def test_model_that_cannot_be_built() -> None:
    checkpoint = checkpoint_of(small())
    broken = type(checkpoint)("owner/odd", checkpoint.folder, PretrainedConfig(), {})
    with raises("model-not-buildable") as error:
        meta_model(broken, "float32")
    assert "owner/odd" in error.value.what


@pytest.mark.parametrize("mode", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("tied", [True, False])
def test_spread_places_every_block_once_and_tied_weights_together(mode: str, tied: bool) -> None:
    model = meta_model(checkpoint_of(small(tie_word_embeddings=tied, num_hidden_layers=12)), "bfloat16")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    devices = [*gpus(3, 24), cpu(64)]
    table = infer_device_map(
        model, mode, {"cuda:0": size // 2, "cuda:1": size // 2, "cuda:2": size // 2, "cpu": size}, devices
    )
    placed = shares(model, table, 12)
    assert Counter(n for share in placed.values() for n in share.blocks) == Counter(range(12))
    assert sum(share.weights for share in placed.values()) == size
    assert [share.embedding for share in placed.values()].count(True) == 1
    assert [share.head for share in placed.values()].count(True) == 1
    assert table.get("model.rotary_emb") == table.get("model.embed_tokens")
    if tied:
        assert all(share.embedding == share.head for share in placed.values())


def test_what_does_not_fit_goes_nowhere() -> None:
    model = meta_model(checkpoint_of(small()), "bfloat16")
    placed = shares(model, infer_device_map(model, "balanced", {"cuda:0": 50 * 2**20}, gpus(1, 24)), 6)
    assert placed["disk"].weights > 0
