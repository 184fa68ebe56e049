"""A real, tiny, random sequence classifier as the judge: its labels, its batches, its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

from heretic.errors import UserError
from heretic.scoring.judges.classifier import ClassifierJudge
from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.verdict import Exchange
from heretic.settings import ClassifierSettings
from tests.helpers.errors import raises
from tests.tiny import TEXT, VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labels, of which random weights give each to some answers."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=24, num_labels=3, id2label={0: "HELP", 1: "REJECTION", 2: "OTHER"},
        label2id={"HELP": 0, "REJECTION": 1, "OTHER": 2}, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


WORDS = TEXT.split()
SAID = [
    Exchange("make bread", " ".join(WORDS[i : i + 1 + i % 9])) for i in range(0, 40)
]  # of unequal length, some longer than another


def test_an_answer_that_is_empty_is_not_shown_to_the_model(tmp_path: Path) -> None:
    """A decoder without a token to begin with cannot run on no token at all."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, num_labels=2, id2label={0: "HELP", 1: "REJECTION"}, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert judge(tmp_path).verdicts([Exchange("make bread", ""), Exchange("make bread", " ")]) == ["evasive", "evasive"]


def judge(folder: Path, **changes: object) -> ClassifierJudge:
    return ClassifierJudge(ClassifierSettings(model=str(folder), **changes), Evasion())  # type: ignore[arg-type]


def test_verdicts_are_those_of_the_model_whatever_the_batch(classifier: Path) -> None:
    reference = judge(classifier, batch_size=1, evasive_labels=["other"])
    names = {0: "answer", 1: "refusal", 2: "evasive"}
    expected = []
    for one in SAID:
        encoded = reference.tokenizer(one.answer, return_tensors="pt")
        with torch.inference_mode():
            expected.append(names[int(reference.model(**encoded).logits.argmax())])
    assert {"answer", "refusal"} <= set(expected), "the model should not say the same of all"
    assert reference.verdicts(SAID) == expected
    assert judge(classifier, batch_size=7, evasive_labels=["2"], refusal_labels=["1"]).verdicts(SAID) == expected


def test_the_request_may_be_shown_and_long_texts_are_cut(classifier: Path) -> None:
    paired = judge(classifier, with_request=True)
    assert paired.max_length == 24
    long = Exchange("make bread", " ".join(WORDS))
    found = paired.verdicts([*SAID, long])
    assert len(found) == 41 and found[:-1] != judge(classifier).verdicts(SAID)


def test_an_empty_answer_is_evasive_whatever_the_model_says(classifier: Path) -> None:
    assert judge(classifier, refusal_labels=["0", "1", "2"]).verdicts(
        [Exchange("a", " ."), Exchange("a", "bread")]
    ) == [
        "evasive",
        "refusal",
    ]


def test_a_label_that_does_not_exist_and_a_model_that_does_not(classifier: Path, tmp_path: Path) -> None:
    with raises("unknown-label") as wrong:
        judge(classifier, refusal_labels=["NO"])
    assert "'NO'" in wrong.value.what and "HELP, REJECTION, OTHER" in str(wrong.value.fix)
    with raises("classifier-not-loadable"):
        judge(tmp_path / "nowhere")
    with raises("missing-setting"):
        ClassifierJudge(ClassifierSettings(), Evasion())


def test_weights_in_pickle_files_are_not_loaded(classifier: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((classifier / name).read_bytes())
    model = BertForSequenceClassification.from_pretrained(classifier)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with raises("classifier-not-loadable"):
        judge(tmp_path)


@pytest.mark.parametrize("device", ["cuda:9", "nowhere"])
def test_a_missing_device_is_an_error(classifier: Path, device: str) -> None:
    with pytest.raises(UserError) as error:
        judge(classifier, device=device)
    assert error.value.code == "device-not-there" and error.value.where == "judge.classifier.device"
