"""Prompts as token ids in a whole run: a template that opens thinking, and a tokenizer with more tokens than the model has rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from heretic.files import read_tensors
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.model.response_prefix import AnswerStart
from heretic.session.encoding import end_answers
from tests.helpers.command import heretic
from tests.helpers.reporters import RecordingReporter
from tests.tiny import TEMPLATE, VOCABULARY, save_tiny, tiny_tokenizer

OPENS = TEMPLATE.replace("<|assistant|> ", "<|assistant|> <think>SWITCH")
SWITCH = "{% if enable_thinking is false %} </think>{% endif %}"


def text_of(file: Path, name: str) -> str:
    return bytes(read_tensors(file)[0][name].tolist()).decode()


@pytest.mark.parametrize(
    ("switch", "variables", "prefix"), [(SWITCH, {"enable_thinking": False}, ""), ("", {}, "\n</think>\n\n")]
)
def test_a_thinking_block_is_closed_alike_in_study_export_compare_and_when_resumed(
    switch: str,
    variables: dict[str, Any],
    prefix: str,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.write_text(config.read_text().replace('response_prefix = ""\n', ""))
    save_tiny(Path("model"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OPENS.replace("SWITCH", switch)
    tokenizer.save_pretrained("model")
    seen: set[bool] = set()
    from heretic.model import chat_format

    render = chat_format.render_messages

    def watched(*arguments: Any) -> str:
        text = render(*arguments)
        seen.add("</think>" in text)
        return text

    monkeypatch.setattr(chat_format, "render_messages", watched)
    run = ("run", "./model", "--run-name", "mine", "--save-to", "out", "--trials", "2")
    first = heretic(capsys, monkeypatch, *run)
    assert first.status == 0, first.err
    assert (first.out + first.err).count("opens a thinking block (<think>)") == 1
    baseline = Path("runs/mine/baseline.safetensors")
    assert json.loads(text_of(baseline, "template_variables")) == variables
    assert text_of(baseline, "response_prefix").startswith(prefix)
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["template_variables"] == variables and manifest["response_prefix"].startswith(prefix)
    if variables:  # the resumed run and the comparison take what is stored
        seen.clear()
        again = heretic(capsys, monkeypatch, "compare", "mine", "--trials", "0", "--prompts", "tell me")
        assert again.status == 0 and "enable_thinking = false" in again.out + again.err
        assert True in seen


def test_a_resumed_study_and_its_card_go_on_with_the_date_of_the_first_day(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(Path("model"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }} " + TEMPLATE
    tokenizer.save_pretrained("model")
    from heretic.model import chat_format
    from heretic.session import model_context

    render, seen = chat_format.render_messages, set[str]()

    def watched(*arguments: Any) -> str:
        text = render(*arguments)
        seen.add(text[:4])
        return text

    monkeypatch.setattr(chat_format, "render_messages", watched)
    for day, more in (("2020-02-03", ()), ("2021-03-04", ("--save-to", "out"))):
        monkeypatch.setattr(model_context, "today_for", lambda _, day=day: day)
        seen.clear()
        command = ("run", "./model", "--run-name", "mine", "--trials", "2" if not more else "+1", *more)
        assert heretic(capsys, monkeypatch, *command).status == 0
        assert "2020" in seen and "2021" not in seen


def test_a_token_that_the_model_does_not_know_is_one_error_that_names_it(
    config: Path, prompt_files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(Path("model"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"w{i}" for i in range(60)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= VOCABULARY
    tokenizer.save_pretrained("model")
    prompts = Path("harmful_eval.txt")
    lines = prompt_files["harmful_eval"].read_text().splitlines()
    lines[2] += " good good"  # of another length, so that there is padding
    prompts.write_text("\n".join(lines))
    source = ("--set", f"prompts.harmful_eval.source={prompts}")
    assert heretic(capsys, monkeypatch, "run", "./model", "--trials", "1", *source).status == 0
    lines[2] += " w59"
    prompts.write_text("\n".join(lines))
    refused = heretic(capsys, monkeypatch, "run", "./model", "--trials", "1", *source)
    assert refused.status == 1 and "[token-outside-embedding]" in refused.err
    assert all(part in refused.err for part in ("w59", str(VOCABULARY), "prompts.harmful_eval, prompt 3"))


def test_preflight_tells_of_a_chat_template_that_fails_or_is_missing(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(Path("model"))
    template = Path("model/chat_template.jinja")
    for content in ("{{ raise_exception('x') }}", ""):
        template.write_text(content)
        told = heretic(capsys, monkeypatch, "preflight", "./model", "--json")
        assert told.status == 1
        assert "chat template" in {f["subject"] for f in json.loads(told.out)["findings"] if f["level"] == "failure"}


def test_answers_also_end_where_the_template_ends_them_unless_a_session_began_without(
    llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "copy"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.save_pretrained(folder)
    model = load(open_checkpoint(str(folder)), ["float32"], {})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    reporter = RecordingReporter()
    assert end_answers(model, None, reporter).end_tokens == {*model.end_tokens, end} and len(reporter.infos) == 1
    assert end_answers(model, AnswerStart("Sure"), reporter).end_tokens == model.end_tokens
    assert end_answers(model, AnswerStart(end_of_turn=end), reporter).end_tokens == {*model.end_tokens, end}
    assert len(reporter.infos) == 1
