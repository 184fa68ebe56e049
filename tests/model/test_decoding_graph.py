"""Decoding by replayed graphs on a pretend GPU: the same answers, a launch a token, and what cannot be captured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPTNeoConfig, GPTNeoForCausalLM
from transformers.cache_utils import DynamicLayer

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model.batching import Batch, Batcher, EditSpec
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import StopCriteria, continue_decoding, verify_draft
from heretic.model.decoding_graph import DecodingGraphs
from heretic.model.kv_cache import keeps_plain_keys
from heretic.model.loading import LanguageModel, load
from heretic.model.turns import Turns
from tests.helpers.pretend_gpus import PretendGpus
from tests.helpers.spread import spread
from tests.tiny import VOCABULARY, save_tiny, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cuda")

SEQUENCES = [[5 + (i * 7 + j) % 80 for j in range(6 + i % 3)] for i in range(6)]
NEW = 30


def answers(model: LanguageModel, graphs: DecodingGraphs | None, trials: int = 2) -> list[list[int]]:
    """Decode with one ablation a trial; two thirds of the rows end early, so that rows are removed from the cache."""
    structure = model.structure
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, structure.width), dim=-1))
    factory = OperatorFactory.prepare(directions, structure.writers, "norm_preserving")
    operators = [factory.operators(Ablation({"mlp": (strength,) * 4})) for strength in (0.5, 0.9)[:trials]]

    def step(batch: Batch) -> Turns[list[list[int]]]:
        limits = StopCriteria(NEW, set(), lambda row, tokens: row % 3 > 0 and len(tokens) > 4)
        state = yield from verify_draft(model.model, batch, [[]] * len(batch.rows), limits)
        yield from continue_decoding(model.model, state, limits, graphs)
        return state.tokens

    batcher = Batcher(32, model.device)
    with apply_operators(structure.writers, *operators):
        found = batcher.run_items("a", SEQUENCES, step, edited=EditSpec(trials), decoding=True)
    return [found[i] for i in range(trials * len(SEQUENCES))]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_answers_are_those_without_graphs_and_a_token_is_a_launch(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / family, family)))
    with PretendGpus() as gpus:
        model = load(checkpoint, ["float32"], {"device_map": {"": 0}})
        torch.manual_seed(1)
        expected = answers(model, None)
        gpus.reset()
        torch.manual_seed(1)
        answers(model, None)
        eager = Counter(gpus.launches)["-"]
        gpus.reset()
        torch.manual_seed(1)
        graphs = DecodingGraphs(enabled=True)
        assert answers(model, graphs) == expected and graphs.enabled
    assert any(len(answer) < NEW for answer in expected) and any(len(answer) == NEW for answer in expected)
    assert gpus.kinds["-"]["graph"] == NEW - 3, (
        "all tokens but the prompt's, and the first before and after rows are removed"
    )
    assert gpus.launches["-"] < eager / 2


def test_launches_that_cannot_be_captured_are_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "llama")))
    with PretendGpus() as gpus:
        model = load(checkpoint, ["float32"], {"device_map": {"": 0}})
        torch.manual_seed(1)
        expected = answers(model, None)
        model.structure.blocks[1].register_forward_hook(lambda *_: torch.ones(1, device="cuda").item() and None)
        graphs = DecodingGraphs(enabled=True)
        for _ in range(2):
            torch.manual_seed(1)
            assert answers(model, graphs) == expected and not graphs.enabled
        assert not gpus.kinds["-"]["graph"]
    assert len([each for each in caplog.records if "by graphs" in each.message]) == 1


def test_a_trial_that_runs_out_of_memory_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, tried, real = open_checkpoint(str(save_tiny(tmp_path / "llama"))), [], DecodingGraphs._try

    def short(graphs: DecodingGraphs, *given: Any) -> None:
        tried.append(given)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(graphs, *given)

    with PretendGpus() as gpus:
        model = load(checkpoint, ["float32"], {"device_map": {"": 0}})
        torch.manual_seed(1)
        expected = answers(model, None)
        torch.manual_seed(1)
        monkeypatch.setattr(DecodingGraphs, "_try", short)
        graphs = DecodingGraphs(enabled=True)
        assert answers(model, graphs) == expected and graphs.enabled and len(tried) == 2
        assert gpus.kinds["-"]["graph"]


@pytest.mark.parametrize(("family", "count"), [("gemma3", 1), ("llama", 2)])
def test_sliding_windows_and_spread_models_decode_without(family: str, count: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / family, family)))
    with PretendGpus(count) as gpus:
        placed = {"": 0} if count == 1 else spread(family, count)
        model = load(checkpoint, ["float32"], {"device_map": placed})
        graphs = DecodingGraphs(enabled=True)
        assert answers(model, graphs, trials=1) and graphs.enabled
        assert not gpus.kinds["-"]["graph"]


def test_a_model_that_counts_from_the_end_of_the_keys_decodes_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=4, num_heads=4, window_size=8, intermediate_size=64,
        attention_types=[[["global", "local"], 2]], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    with PretendGpus():
        model = load(checkpoint, ["float32"], {"device_map": {"": 0}})
        torch.manual_seed(1)
        expected = answers(model, None)
        torch.manual_seed(1)
        graphs = DecodingGraphs(enabled=True)
        assert answers(model, graphs) == expected and not graphs.enabled
    assert "change the answers by KL" in caplog.text


def test_layers_without_keys_hold_something_else() -> None:
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    assert keeps_plain_keys(cache)
    cache.layers.append(DynamicLayer())  # of cross-attention in Llama 3.2 Vision, of linear attention in MiniMax
    assert not keeps_plain_keys(cache) and not keeps_plain_keys(None)
