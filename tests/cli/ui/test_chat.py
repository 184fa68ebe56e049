"""The conversation: who answers, what is remembered, what reaches the terminal; once with a real run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from heretic.cli.ui.chat import Chat
from heretic.errors import UserError
from heretic.model.chat_format import ChatFormat
from tests.helpers.command import heretic


class Model:
    """Answers with how many messages it was given and whether it is edited, or with what it is told to."""

    def __init__(self, says: str = "") -> None:
        self.says = says
        self.asked: list[tuple[list[dict[str, str]], bool]] = []

    def __call__(self, messages: Sequence[dict[str, str]], ablated: bool, on_text: Callable[[str], None]) -> str:
        self.asked.append(([dict(m) for m in messages], ablated))
        said = self.says or f"{'yes' if ablated else 'no'} {len(messages)}"
        for word in said.split():
            on_text(word + " ")
        if messages[-1]["content"] == "long":
            raise KeyboardInterrupt
        return said


def talk(*lines: str) -> tuple[str, Model, Chat]:
    console, model = Console(file=io.StringIO(), width=100), Model()
    chat = Chat(console, model)
    chat.run(lines)
    return console.file.getvalue(), model, chat  # type: ignore[attr-defined]


def test_switching_sides_keeps_the_conversation() -> None:
    _, model, _ = talk("hello", "/original", "and now?", "/both", "again", "/new", "fresh", "/quit", "not asked")
    assert [(len(m), ablated) for m, ablated in model.asked] == [
        (1, True), (3, False), (5, False), (5, True), (1, False), (1, True),
    ]  # fmt: skip
    assert model.asked[1][0][1] == {"role": "assistant", "content": "yes 1"}


def test_the_terminal_is_not_steered_by_what_is_said() -> None:
    console = Console(file=io.StringIO(), width=100)

    def evil(_m: object, _a: object, on_text: Callable[[str], None]) -> str:
        on_text("\x1b[2J[bold]x[/bold]")
        return "x"

    Chat(console, evil).run(["hi"])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text and "\\x1b[2J[bold]x[/bold]" in text


def test_on_a_wide_terminal_both_answer_side_by_side() -> None:
    for width, beside in ((100, True), (60, False)):
        console, model = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True), Model()
        chat = Chat(console, model)
        chat.run(["/both", "hello", "long"])
        lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
        assert (["no", "1", "yes", "1"] in lines) is beside
        assert [m["content"] for m in chat.shown if m["role"] == "assistant"] == ["no 1", "yes 1", "no 3", "yes 3"]
        assert chat.messages[-1]["content"] == "yes 3"


def test_brackets_in_an_answer_stay_as_they_are_side_by_side() -> None:
    console, model = (
        Console(file=io.StringIO(), width=100, force_terminal=True, no_color=True),
        Model("list[int] [bold]"),
    )
    Chat(console, model).run(["/both", "hello"])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "list[int] [bold]" in text and "\\[" not in text


def test_an_answer_cut_short_stays_in_the_conversation() -> None:
    text, model, _ = talk("long", "go on")
    assert "(interrupted)" in text and model.asked[1][0][1]["content"] == "yes 1"


def test_saving_says_who_said_what_and_a_bad_place_is_no_end() -> None:
    text, _, _ = talk("/both", "hello", "/save talk.json", "/save /nowhere/at/all", "/save", "/huh")
    kept = json.loads(Path("talk.json").read_text())
    assert [m.get("model") for m in kept] == [None, "original", "ablated"] and Path("chat.json").is_file()
    assert "not saved" in text and text.count("/quit") == 2


def test_a_real_run_is_talked_to_and_compared(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heretic(capsys, monkeypatch, "run").status == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("make bread\n/both\nwrite soup\n/save said.json\n"))
    ran = heretic(capsys, monkeypatch, "chat", "--trial", "1", "--tokens", "5")
    assert ran.status == 0 and "Trial 1" in ran.out and "original:" in ran.out
    assert len(json.loads(Path("said.json").read_text())) == 5
    run = next(Path("runs").iterdir()).name
    Path("mine.txt").write_text("make bread me\nwhat stars is\n")
    asked = ("compare", run, "--prompts", "mine.txt", "--tokens", "4")
    rows = json.loads(heretic(capsys, monkeypatch, *asked, "--trials", "1,2", "--json").out)
    assert [r["prompt"] for r in rows] == ["make bread me", "what stars is"]
    assert set(rows[0]) == {"prompt", "original", "trial 1", "trial 2"} and any(
        r["original"] != r["trial 1"] for r in rows
    )
    assert "trial 2" in heretic(capsys, monkeypatch, *asked, "--trials", "2").out
    for wrong, code in (("x", "invalid-option"), ("77", "trial-not-found")):
        ran = heretic(capsys, monkeypatch, *asked, "--trials", wrong)
        assert ran.status == 1 and ran.code == code


def test_a_conversation_that_is_too_long_is_said_and_goes_on() -> None:
    console = Console(file=io.StringIO(), width=100)

    def small(messages: Sequence[dict[str, str]], _a: bool, on_text: Callable[[str], None]) -> str:
        if len(messages[-1]["content"]) > 20:
            raise UserError("too long", fix="/new")
        return "yes"

    chat = Chat(console, small)
    chat.run(["x" * 30, "short", f"/save {'y' * 300}", "/save"])
    assert "too long" in console.file.getvalue() and "not saved" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [m["content"] for m in json.loads(Path("chat.json").read_text())] == ["short", "yes"]


def test_a_line_that_begins_with_a_slash_is_sent_after_two() -> None:
    text, model, _ = talk("/etc/hosts is what?", "//etc/hosts is what?")
    assert [messages[-1]["content"] for messages, _ in model.asked] == ["/etc/hosts is what?"]
    assert "not sent" in text
    text, model, _ = talk("bak\udce9")
    assert not model.asked and "UTF-8" in text


def test_a_conversation_goes_on_without_messages_that_got_no_answer(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heretic(capsys, monkeypatch, "run").status == 0
    asked: list[list[str]] = []
    usual = ChatFormat.conversation

    def conversation(chat: ChatFormat, messages: Sequence[dict[str, str]]) -> str:
        if messages[0]["content"] in ("one", "two"):
            asked.append([m["content"] for m in messages])
        return usual(chat, messages)

    monkeypatch.setattr(ChatFormat, "conversation", conversation)
    monkeypatch.setattr("heretic.pipeline.actions.stream_answer", lambda *_: "" if len(asked) == 1 else "yes")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    ran = heretic(capsys, monkeypatch, "chat", "--trial", "1")
    assert asked == [["one"], ["two"], ["two", "yes", "three"]] and ran.out.count("empty") == 1
