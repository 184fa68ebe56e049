"""Chat templates that fail, have no end, or are none: each is one error with a code, and the next one renders."""

from __future__ import annotations

import datetime
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from heretic.errors import UserError
from heretic.model import template as template_module
from heretic.model.template import (
    PROCESS,
    read_template,
    render,
    render_messages,
    template_beside,
    template_of,
    today_for,
)
from heretic.model.template_process import answer
from heretic.settings import Settings
from tests.tiny import TEMPLATE, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "tell me"}]
EXPECTED = "<|user|> tell me <|end|><|assistant|> "


def rendered(template: Any, **variables: Any) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return render(tokenizer, MESSAGES, variables)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("\n{{ ''.__class__.__mro__ }}", 2),
        ("\n\n{% include 'other' %}", 3),
        ("{{ raise_exception('no \x1b[2J system role') }}", 1),
        ("a\n{% if %}", 2),
        ("a\n\n{{ 1 / 0 }}", 3),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", None),
        ("{{ 10 ** 5000 }}", None),
        ("{% for i in range(10 ** 9) %}{% endfor %}", 1),
        ("{{ " + "-" * 100_000 + "1 }}", None),
        ("{{ '\\ud800' }}", None),
        ("{{ messages.system.content }}", 1),
    ],
)
def test_a_template_that_fails_is_one_error_with_its_line(template: str, line: int | None) -> None:
    with pytest.raises(UserError) as error:
        rendered(template)
    assert error.value.code == "chat-template"
    assert line is None or (error.value.where or "").endswith(f"line {line}")
    assert all(part.isprintable() for part in str(error.value).splitlines()), "an escape sequence is shown, not sent"
    assert len(str(error.value)) < 600 and str(error.value).count("\n") == 2


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ '%10000000000d' | format(1) }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' * 10 ** 6 }}",
    ],
)
def test_a_template_that_takes_memory_without_end_is_stopped(template: str) -> None:
    with pytest.raises(UserError) as error:
        rendered(template)
    assert error.value.code == "chat-template-limit"
    assert rendered(TEMPLATE) == EXPECTED


def test_a_template_that_computes_without_end_is_stopped_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        template_module, "ANSWERED_WITHIN", 0.5
    )  # the clock's limit, in place of the limit on computing
    errors: list[BaseException] = []

    def work() -> None:
        try:
            rendered("{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}{% endfor %}{% endfor %}")
        except BaseException as error:
            errors.append(error)

    PROCESS.start()
    rendered(TEMPLATE)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and isinstance(errors[0], UserError) and errors[0].code == "chat-template-limit"
    monkeypatch.undo()
    assert rendered(TEMPLATE) == EXPECTED


def test_computing_time_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # a process of its own: the limit ends it
        os.close(writer)
        monkeypatch.setattr("heretic.model.template_process.CPU_SECONDS", 0.1)

        def endless(*_: object) -> str:
            while True:
                pass

        answer({"template": "", "messages": MESSAGES, "variables": {}}, endless)
        os._exit(0)
    os.close(reader)
    os.close(writer)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGPROF


def test_a_process_that_was_killed_is_started_again() -> None:
    assert rendered(TEMPLATE) == EXPECTED
    assert PROCESS.process is not None
    PROCESS.process.kill()
    PROCESS.process.wait()
    assert rendered(TEMPLATE) == EXPECTED


def test_packages_in_the_current_folder_are_not_imported() -> None:
    PROCESS.end()
    for name in ("json.py", "transformers.py", "signal.py"):
        Path(name).write_text("raise SystemExit(3)\n")
    assert rendered(TEMPLATE) == EXPECTED


def test_variables_reach_the_template() -> None:
    assert rendered("{{ enable_thinking }}{{ bos_token }}", enable_thinking=False) == "False<s>"


def test_a_table_of_templates_needs_a_default() -> None:
    assert rendered({"default": TEMPLATE, "tool_use": "x"}) == EXPECTED
    for given, code in (
        ({"tool_use": "x"}, "chat-template-choice"),
        (7, "chat-template-type"),
        ("", "no-chat-template"),
    ):
        with pytest.raises(UserError) as error:
            rendered(given)
        assert error.value.code == code
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert template_of(tokenizer) == ""


def test_code_of_a_tokenizer_that_fails_is_an_error() -> None:
    tokenizer = tiny_tokenizer()

    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, *_: object, **__: object) -> str:
            raise RuntimeError("no\x1b[2J")

    tokenizer.__class__ = Own
    with pytest.raises(UserError) as error:
        render(tokenizer, MESSAGES, {})
    assert error.value.code == "chat-template"


@pytest.mark.parametrize("content", [None, b"", b"  \n", b"\xff\xfe", b"x" * 2_000_000])
def test_a_template_file_that_is_no_template_is_an_error(content: bytes | None) -> None:
    if content is not None:
        Path("t.jinja").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_template(Settings(chat_template="t.jinja"))
    assert error.value.code == "chat-template-file"


@pytest.mark.parametrize("name", ["/dev/zero", ".", "a\0b"])
def test_a_template_that_is_no_file_is_an_error(name: str) -> None:
    with pytest.raises(UserError) as error:
        read_template(Settings().model_copy(update={"chat_template": name}))
    assert error.value.code == "chat-template-file"


def test_a_template_file_is_read() -> None:
    Path("t.jinja").write_text(TEMPLATE)
    assert read_template(Settings(chat_template="t.jinja")) == TEMPLATE
    assert read_template(Settings()) == ""


PARTS = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (PARTS, "tell me"),
        ("{{ messages[0].content[0]['text'].strip() }}", "tell me"),  # fails for a text
        ("{{ messages[0].content | upper }}", "TELL ME"),
        ("{{ messages[0].content | tojson }}", '"tell me"'),
        ("{{ messages[0].content }}!", "tell me!"),
        ("no prompt", "no prompt"),
    ],
)
def test_contents_are_passed_as_parts_only_to_templates_that_need_them(template: str, text: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert render_messages(tokenizer, MESSAGES, {}) == text


def test_a_prompt_that_looks_like_a_part_is_passed_on() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PARTS
    prompt = """fix {"type": "x"}"""
    assert render_messages(tokenizer, [{"role": "user", "content": prompt}], {}) == prompt


def test_thoughts_that_a_template_leaves_out_of_earlier_answers_change_nothing() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] if m.content is string }}|{% endfor %}"
    )
    talk = [*MESSAGES, {"role": "assistant", "content": "<think>x</think>yes"}, {"role": "user", "content": "go on"}]
    assert render_messages(tokenizer, talk, {}) == "tell me|yes|go on|"


def test_the_error_of_a_template_that_takes_neither_is_that_for_plain_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('text' if messages[0].content is string else 'parts') }}"
    with pytest.raises(UserError) as error:
        render_messages(tokenizer, MESSAGES, {})
    assert error.value.code == "chat-template" and "text" in str(error.value)


def test_the_date_that_a_template_prints_can_be_fixed() -> None:
    tokenizer = tiny_tokenizer()
    assert today_for(tokenizer) == ""
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert today_for(tokenizer) == datetime.date.today().isoformat()
    assert render_messages(tokenizer, MESSAGES, {}, "2024-02-03") == "03 Feb 2024 tell me"
    assert f"{datetime.date.today():%Y}" in render_messages(tokenizer, MESSAGES, {})


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_template_of_a_processor_is_found(name: str, tmp_path: Path) -> None:
    assert template_beside(tmp_path) is None
    file = tmp_path / name
    for content in ("{", "[]", '{"chat_template": ["x"]}'):
        file.write_text(content)
        assert template_beside(tmp_path) is None
    file.write_text(json.dumps({"chat_template": TEMPLATE}))
    assert template_beside(tmp_path) == TEMPLATE
