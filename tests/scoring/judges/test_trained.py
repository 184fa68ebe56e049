"""The trained judge: its head on a real encoder of tiny size, and when `heretic evaluate` takes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from heretic.runs import fingerprint
from heretic.scoring.judges import trained
from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.registry import make_judge, try_judge, with_evaluation_judge
from heretic.scoring.judges.trained import Head, SentenceEncoder, TrainedJudge, features, local_encoder, sentences
from heretic.scoring.judges.verdict import ORDER, Exchange
from heretic.settings import Settings, TrainedSettings
from tests.helpers.errors import raises
from tests.tiny import TEXT, VOCABULARY, tiny_tokenizer

WORDS = TEXT.split()
WIDTH, BLOCK = 16, 2
SAID = [" ".join(WORDS[i : i + 1 + i % 9]) for i in range(40)]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of three blocks."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=300, pad_token_id=0,
    )  # fmt: skip
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def ship(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Head]:
    """Replace the shipped head by one for the tiny encoder."""
    torch.manual_seed(4)
    weight, bias = torch.randn(3, 3 * WIDTH + 1), torch.zeros(3)
    described = features(SentenceEncoder(str(encoder), "cpu", BLOCK), SAID)
    bias -= (described @ weight.T).mean(0)  # so that random weights give each label to some answers
    logits = described[:1] @ weight.T + bias
    data = {
        "block": BLOCK, "labels": list(ORDER), "weight": weight.tolist(), "bias": bias.tolist(), "example": SAID[0],
        "example_logits": logits[0].tolist(),
    }  # fmt: skip
    monkeypatch.setattr(trained, "head_text", lambda: json.dumps(data))
    return Head.shipped


def judge(folder: Path) -> TrainedJudge:
    return TrainedJudge(TrainedSettings(encoder=str(folder)), Evasion())


def test_a_text_is_the_mean_of_a_blocks_states_over_its_tokens(encoder: Path) -> None:
    loaded = SentenceEncoder(str(encoder), "cpu", BLOCK)
    texts = [SAID[3], SAID[7], SAID[0]]
    for text, vector in zip(texts, loaded.embed(texts), strict=True):
        with torch.inference_mode():
            encoded = loaded.tokenizer(text, return_tensors="pt")
            mean = loaded.model(**encoded, output_hidden_states=True).hidden_states[BLOCK][0].mean(0)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)


def test_verdicts_are_the_heads_best_label_in_any_batch(encoder: Path, ship: Callable[[], Head]) -> None:
    made = judge(encoder)
    verdicts = made.verdicts([Exchange("a", answer) for answer in SAID])
    assert set(verdicts) == set(ORDER)
    alone = [made.verdicts([Exchange("a", answer)])[0] for answer in SAID]
    assert verdicts == alone
    logits = ship().logits(features(made.encoder, SAID))
    assert [ORDER[i] for i in logits.argmax(1)] == verdicts


def test_an_empty_answer_is_evasive_and_an_answer_that_repeats_the_request_too(
    encoder: Path, ship: Callable[[], Head]
) -> None:
    made = judge(encoder)
    answered = next(text for text in SAID if made.verdicts([Exchange("other words", text)]) == ["answer"])
    assert made.verdicts([Exchange("a", " ."), Exchange(f"{answered} please", answered)]) == ["evasive", "evasive"]
    assert made.verdicts([]) == []


def test_another_encoder_is_refused(encoder: Path, ship: Callable[[], Head], tmp_path: Path) -> None:
    torch.manual_seed(9)
    config = BertConfig.from_pretrained(encoder)
    BertModel(config).save_pretrained(tmp_path / "same-size")
    config.hidden_size = 32
    BertModel(config).save_pretrained(tmp_path / "wider")
    for name in ("same-size", "wider"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
        with raises("encoder-mismatch"):
            judge(tmp_path / name)


def test_an_encoder_that_is_missing_or_pickled_is_not_loaded(encoder: Path, tmp_path: Path) -> None:
    missing = Settings.model_validate({"judge": {"kind": "trained", "trained": {"encoder": str(tmp_path / "none")}}})
    for attempt in (make_judge, try_judge):
        with raises("encoder-not-loadable"):
            attempt(missing)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    torch.save(BertModel.from_pretrained(encoder).state_dict(), tmp_path / "pytorch_model.bin")
    with raises("encoder-not-loadable"):
        judge(tmp_path)
    assert local_encoder(str(tmp_path)) is None


def test_evaluate_takes_it_where_the_encoder_is_at_hand(encoder: Path, tmp_path: Path) -> None:
    def chosen(**changes: object) -> str:
        judge = {"trained": {"encoder": str(encoder)}, **changes.pop("judge", {})}  # type: ignore[dict-item]
        return with_evaluation_judge(Settings.model_validate({"judge": judge, **changes})).judge.kind

    assert chosen() == "trained"
    assert chosen(judge={"trained": {"encoder": str(tmp_path)}}) == "markers"
    assert chosen(judge={"trained": {"encoder": "nobody/has-this-encoder"}}) == "markers"
    assert chosen(judge={"trained": {"encoder": "no id/of a hub/"}}) == "markers"
    assert chosen(judge={"evaluate": "kind"}) == "markers"
    assert chosen(judge={"kind": "llm"}) == "llm"
    assert chosen(refusal_markers=["never"]) == chosen(language="de") == chosen(behavior="empty openings") == "markers"


def test_sentences() -> None:
    assert sentences("Sure! Here it is:\n1. Mix. However, no.") == [
        "Sure!",
        "Here it is:",
        "1.",
        "Mix.",
        "However, no.",
    ]
    assert sentences("不。我拒绝。") == ["不。", "我拒绝。"] and sentences("...") == ["..."]


def test_the_fingerprint_covers_head_and_encoder(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"judge": {"kind": "trained", "trained": {"encoder": str(encoder)}}})
    before = fingerprint._judge_hash(settings)
    monkeypatch.setattr(fingerprint, "head_text", lambda: "another")
    after = fingerprint._judge_hash(settings)
    assert before["classifier"] == after["classifier"] and before["judge_head"] != after["judge_head"]
    assert fingerprint._judge_hash(Settings()) == {}


def test_the_shipped_head_fits_a_block_of_minilm() -> None:
    head = Head.shipped()
    assert head.weight.shape == (3, 3 * 384 + 1) and head.labels == ORDER and 1 <= head.block <= 6
