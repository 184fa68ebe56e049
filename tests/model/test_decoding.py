"""Our greedy decoding gives the tokens that transformers' generate gives."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from heretic.model import decoding
from heretic.model.batching import Batcher
from heretic.model.decoding import decode
from heretic.model.forward import padding_sensitive
from heretic.model.turns import finish
from tests.helpers.errors import raises
from tests.tiny import COMMON, FAMILIES, WINDOWED, tiny_model

PROMPTS = [[5, 9, 17], [7, 8, 11, 60, 3, 22, 41, 33, 9, 10, 12, 13], [40], [21, 22, 23, 24, 25]]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate_with_left_padding_and_rows_that_end_early(family: str) -> None:
    model = tiny_model(family)
    batch = Batcher(8).batch([0, 1, 2, 3], PROMPTS)
    model.generation_config.eos_token_id = None  # or generate stops there although the given config does not say so
    config = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)
    reference = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config)
    full = reference[:, batch.input_ids.shape[1] :].tolist()
    assert finish(decode(model, batch, 20, set())) == full
    # Tokens that occur in the middle of two answers become end tokens: those rows leave, the others go on undisturbed.
    ends = {full[1][4], full[3][2]}
    expected = [row[: next((i for i, t in enumerate(row) if t in ends), 20)] for row in full]
    assert finish(decode(model, batch, 20, ends)) == expected
    assert len({len(row) for row in expected}) > 1


def test_a_row_ends_when_the_callback_says_so() -> None:
    model = tiny_model("llama")
    batch = Batcher(8).batch([0, 1, 2, 3], PROMPTS)
    full = finish(decode(model, batch, 12, set()))
    stopped = finish(
        decode(model, batch, 12, set(), ended=lambda _, tokens: len(tokens) == 3 or tokens[-1] == full[2][6])
    )
    assert all(len(row) <= 3 for row in stopped)
    assert [row == whole[: len(row)] for row, whole in zip(stopped, full, strict=True)] == [True] * 4


@pytest.mark.parametrize("between", [2, 4, 50])
def test_looking_only_every_few_tokens_changes_nothing(between: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    batch = Batcher(8).batch([0, 1, 2, 3], PROMPTS)
    whole = finish(decode(model, batch, 13, set()))
    ends = {whole[0][2], whole[1][5]}
    expected = finish(decode(model, batch, 13, ends))
    monkeypatch.setitem(decoding.SYNC_INTERVAL, "cpu", between)
    assert finish(decode(model, batch, 13, set())) == whole and finish(decode(model, batch, 13, ends)) == expected


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WINDOWED])  # their windows are too short
def test_texts_that_are_tried_leave_the_answers_as_they_are(family: str) -> None:
    model = tiny_model(family)
    plain = finish(decode(model, Batcher(8).batch([0, 1, 2, 3], PROMPTS), 12, set()))
    # Right to the end, wrong from the third token, wrong from the first, nothing to try.
    tried = [plain[0][:5], [*plain[1][:2], plain[1][2] ^ 1, 7], [plain[2][0] ^ 1, 3, 4], []]
    sequences = [p + t for p, t in zip(PROMPTS, tried, strict=True)]
    limits = decoding.StopCriteria(12, set())
    answers = finish(decoding.verify_draft(model, Batcher(8).batch([0, 1, 2, 3], sequences), tried, limits))
    assert [len(t) for t in answers.tokens] == [6, 3, 1, 1] and answers.matching == [True, False, False, False]
    assert [len(p) for p in answers.likely] == [5, 4, 3, 0]
    finish(decoding.continue_decoding(model, answers, limits))
    assert answers.tokens == plain


def test_a_model_without_a_cache_that_can_be_cut_falls_back_to_generate() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = Batcher(8).batch([0, 1], [[5, 9, 17], [7, 8, 11]])
    answers = finish(decode(model, batch, 5, {2}))
    assert [len(a) for a in answers] == [5, 5]


def test_rows_of_a_hybrid_model_stay_in_the_batch_and_are_right() -> None:
    from transformers import AutoModelForCausalLM, Lfm2Config

    torch.manual_seed(0)
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    model = AutoModelForCausalLM.from_config(Lfm2Config(**COMMON, layer_types=kinds, conv_L_cache=3)).eval()
    sequences = [p[-3:] for p in (*PROMPTS[:2], PROMPTS[3])]  # of one length: convolutions see the padding
    batch = Batcher(8).batch([0, 1, 2], sequences)
    whole = finish(decode(model, batch, 12, set()))
    ends = {whole[0][2], whole[1][5]}
    expected = [row[: next((i for i, t in enumerate(row) if t in ends), 12)] for row in whole]
    assert finish(decode(model, batch, 12, ends)) == expected


def test_a_model_that_keeps_its_states_to_itself_is_left_to_generate_in_even_batches() -> None:
    from transformers import AutoModelForCausalLM, RecurrentGemmaConfig

    torch.manual_seed(0)
    kinds = ("recurrent", "attention")
    config = RecurrentGemmaConfig(**COMMON, lru_width=32, attention_window_size=32, block_types=kinds)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_().add_(torch.randn_like(parameter) * 0.1)
    assert decoding.decoded_by_generate(model, "cpu") and not decoding.decoded_by_generate(tiny_model("llama"), "cpu")
    assert padding_sensitive(model, PROMPTS, Batcher(8)) and not padding_sensitive(
        tiny_model("llama"), PROMPTS, Batcher(8)
    )
    batch = Batcher(8).batch([0, 1], [PROMPTS[3], PROMPTS[3][::-1]])
    model.generation_config.eos_token_id = None
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    reference = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config)
    assert finish(decode(model, batch, 8, set())) == reference[:, batch.input_ids.shape[1] :].tolist()


def test_what_transformers_cannot_generate_is_an_error_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def fails(**_: object) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(decoding, "has_cache", lambda _: False)
    monkeypatch.setattr(model, "generate", fails)
    with raises("architecture-not-supported") as error:
        finish(decode(model, Batcher(8).batch([0], PROMPTS), 8, set()))
    assert "LlamaForCausalLM" in error.value.what and "sizes do not match" in error.value.what
