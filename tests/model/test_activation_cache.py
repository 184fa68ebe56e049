"""What is kept of the original's passes: as much as fits, and it grows upward with the trials."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from heretic.model.activation_cache import ActivationCache, Recording, allocate_cache
from heretic.model.batching import Batch, Batcher, EditSpec, SharedPrefix, shared_tokens
from heretic.model.forward import hidden_states, supports_mid_stack_start
from heretic.model.patching import replaced_forward
from tests.tiny import tiny_model

START = [5, 9, 17, 33, 41, 60, 61, 62]
PROMPTS = [START + rest for rest in ([7], [8, 9, 10, 11], [8, 9], [20, 21, 22])]


def ask(model: nn.Module, entries: ActivationCache, first_layer: int, rows: list[int]) -> tuple[torch.Tensor, object]:
    made = Batcher(8).batch(rows, PROMPTS, SharedPrefix(shared_tokens(PROMPTS)), entries)
    batch = Batch(
        made.rows,
        made.input_ids,
        made.attention_mask,
        made.shared_prefix,
        None,
        EditSpec(first_layer=first_layer),
        entries,
    )
    found = hidden_states(model, batch, use_cache=True)
    entries.store()
    return found


def kept(model: nn.Module, stride: int = 1) -> ActivationCache:
    blocks = model.model.layers  # type: ignore[union-attr]
    beginning = ActivationCache(blocks, [START], with_cache=True)
    return ActivationCache(blocks, PROMPTS, start=len(START), stride=stride, with_cache=True, beginning=beginning)


def test_passes_begin_as_far_up_as_all_their_rows_are_known() -> None:
    model = tiny_model("qwen2")
    entries = kept(model)
    plain, cache = ask(model, entries, 2, [0, 1])
    assert [entries.resume_layer(rows, 3) for rows in ([0], [0, 1], [1, 2])] == [2, 2, 0]
    ran: list[int] = []
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(i))
    later, now = ask(model, entries, 3, [0, 1])
    assert set(ran) == {2, 3} and entries.resume_layer([0, 1], 3) == 3
    assert torch.allclose(plain[:, -1], later[:, -1], atol=1e-5)
    for layer in range(4):
        for kind in ("keys", "values"):  # row 1 has no padding, in which anything may stand
            before, after = (getattr(c.layers[layer], kind)[1] for c in (cache, now))  # type: ignore[attr-defined]
            assert torch.allclose(before, after, atol=1e-5)


def test_with_a_stride_only_some_blocks_are_begun_at() -> None:
    model = tiny_model("qwen2")
    entries = kept(model, stride=2)
    ask(model, entries, 3, [0, 1, 2, 3])
    assert sorted(entries.hidden) == [2] and entries.resume_layer([0, 1, 2, 3], 3) == 2
    assert sorted(entries.cache) == [0, 1, 2]
    plain, _ = ask(model, kept(model), 0, [0, 1, 2, 3])
    assert torch.allclose(plain[:, -1], ask(model, entries, 3, [0, 1, 2, 3])[0][:, -1], atol=1e-5)


@pytest.mark.parametrize(("budget", "stride"), [(10**9, 1), (4 * 12 * 100 + 4 * 12 * 40, 1), (100, None)])
def test_as_much_is_kept_as_fits(budget: int, stride: int | None) -> None:
    blocks = nn.ModuleList(nn.Identity() for _ in range(4))
    sequences = [[1] * 6, [2] * 6]
    made = allocate_cache(blocks, sequences, [], with_cache=True, bytes_per_token=(100, 40), budget=budget)
    assert (made.stride if made else None) == stride
    many = nn.ModuleList(nn.Identity() for _ in range(32))
    halved = allocate_cache(many, sequences, [], with_cache=False, bytes_per_token=(100, 40), budget=16 * 12 * 100)
    assert halved is not None and halved.stride == 2


def test_it_is_switched_off_where_blocks_hand_on_something_else() -> None:
    model = tiny_model("qwen2")
    inner = model.model.layers[1].forward

    def twice(*args: object, **kwargs: object) -> torch.Tensor:
        return inner(*args, **kwargs) + first[-1]  # depends on what an earlier block computed in this pass

    first: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, output: first.append(output))
    assert supports_mid_stack_start(model, model.model.layers, PROMPTS, Batcher(8))
    with replaced_forward(model.model.layers[2], twice):
        assert not supports_mid_stack_start(model, model.model.layers, PROMPTS, Batcher(8))
    handle.remove()
    assert "forward" not in model.model.layers[2].__dict__


def test_keys_of_a_skipped_block_lie_where_the_block_runs() -> None:
    """Not where the last block does: they may be on two GPUs, of which the meta device stands for one here."""
    model = tiny_model("qwen2")
    entries = kept(model)
    ask(model, entries, 2, [0, 1])
    assert entries.devices == {0: torch.device("cpu"), 1: torch.device("cpu")}
    cache = DynamicCache(config=model.config)
    away = torch.zeros(2, 2, 4, 8, device="meta")
    for layer in (2, 3):
        cache.update(away, away, layer)
    entries.update_kv_cache(cache, Recording([0, 1], 2, 2))
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "cpu", "meta", "meta"]
