"""The chat of the live page, over HTTP with a tiny model, and once in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from heretic.hardware import locks
from heretic.interrupt import StopSignal
from heretic.pipeline.browser_chat import BrowserChat, _Asked
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.report.chat import ChatModel, Question
from heretic.report.server import LiveServer, open_server
from heretic.runs.folder import RunFolder, find_run
from heretic.settings.sources import resolve
from tests.helpers.browser import browser as open_browser
from tests.helpers.browser import missing
from tests.helpers.errors import raises
from tests.helpers.serving import serving

PROMPT = "make a bread of stars"
SCRIPT = "<img src=x onerror=window.hit=1>"


@pytest.fixture(scope="module")
def folder(llama: Path, prompt_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of two trials, which all tests chat with."""
    place = tmp_path_factory.mktemp("chat")
    wanted = {
        "model": str(llama),
        "n_trials": 2,
        "max_response_length": 6,
        "batch_size": 4,
        "device_map": "cpu",
        "runs_dir": str(place / "runs"),
        "run_name": "mine",
        "prompts": {role: {"source": str(file)} for role, file in prompt_files.items()},
        "search": {"start": "kernels", "n_startup_trials": 2, "patience": 0},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(place))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr("heretic.hardware.host.native_bfloat16", lambda: False)
        run(resolve(None, wanted), reporter=NULL_REPORTER, stop=StopSignal())
    return find_run("mine", str(place / "runs"))


@contextmanager
def page_of(folder: RunFolder, chat: BrowserChat | None = None) -> Iterator[LiveServer]:
    server = open_server(folder, str(folder.path.parent), os.environ, chat or BrowserChat(folder))
    with serving(server):
        yield server


def post(server: LiveServer, path: str, body: Any = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    text = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
    connection.request("POST", f"/{server.token}/{path}", text, {"X-Heretic": "yes"})
    return connection.getresponse()


def question(prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"trial": 1, "tokens": 6, "original": messages, "ablated": messages, **more}


def events(answer: http.client.HTTPResponse) -> list[dict[str, str]]:
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/event-stream"
    return [json.loads(line[6:]) for line in answer.read().decode().splitlines() if line.startswith("data: ")]


def wait_for(chat: ChatModel, phase: str) -> dict[str, Any]:
    end = time.monotonic() + 60
    while (state := chat.state())["phase"] != phase:
        assert time.monotonic() < end, state
        time.sleep(0.02)
    return state


def written_since(place: Path, start: float) -> bytes:
    return b"".join(p.read_bytes() for p in place.rglob("*") if p.is_file() and p.stat().st_mtime >= start)


def test_both_models_answer_one_prompt_and_nothing_of_it_is_written(folder: RunFolder) -> None:
    with page_of(folder) as server:
        chat = server.run.chat
        refused = post(server, "chat/ask", question())
        assert refused.status == 409 and "[chat-not-loaded]" in refused.read().decode()
        start = time.time() - 1
        assert post(server, "chat/load").status == 200
        wait_for(chat, "ready")
        assert post(server, "chat/load").status == 409
        assert not server.run.state()["can_stop"] and not server.run.state()["can_continue"]
        said = events(post(server, "chat/ask", question()))
        whole = {e["model"]: e["answer"] for e in said if "answer" in e}
        assert list(whole) == ["original", "ablated"]
        assert whole["original"] != whole["ablated"]
        for model, answer in whole.items():
            assert "".join(e["text"] for e in said if e["model"] == model and "text" in e).strip() == answer
        unknown = events(post(server, "chat/ask", question(trial=77)))
        assert "[trial-not-found]" in unknown[0]["error"]
        assert PROMPT.encode() not in written_since(folder.path.parents[1], start)
        assert post(server, "chat/unload").status == 200
        wait_for(chat, "off")
        assert locks.lock_owner(folder.lock) is None
    assert PROMPT.encode() not in written_since(folder.path.parents[1], start)


def test_one_answer_at_a_time_which_stop_and_a_closed_page_end(folder: RunFolder) -> None:
    with page_of(folder) as server:
        chat = server.run.chat
        assert isinstance(chat, BrowserChat)
        chat.load()
        wait_for(chat, "ready")
        for by_closing in (False, True):
            first = post(server, "chat/ask", question(tokens=8000))  # until the model's context is full
            asked = chat._current
            assert first.readline().startswith(b"data: ")
            second = post(server, "chat/ask", question())
            assert second.status == 409 and "[chat-busy]" in second.read().decode()
            if by_closing:
                first.close()
            else:
                assert post(server, "chat/stop").status == 200
                assert b'"answer"' not in first.read()
            wait_for(chat, "ready")
            assert asked is not None
            left = iter(asked.events.get_nowait, None) if by_closing else []
            assert not any("answer" in event for event in left)
        assert len([e for e in events(post(server, "chat/ask", question())) if "answer" in e]) == 2


def test_it_is_refused_while_another_process_works_on_the_run(folder: RunFolder) -> None:
    with page_of(folder) as server, locks.acquire_locks(locks.device_locks([]), model="other"):
        assert post(server, "chat/load").status == 200
        problem = wait_for(server.run.chat, "off")["problem"]
        assert "[busy]" in problem and str(os.getpid()) in problem


def test_a_question_that_is_none_is_refused(folder: RunFolder) -> None:
    with page_of(folder) as server:
        wrong = [b"{", question(original=[]), question(tokens=0), question(more=1)]
        wrong.append(question(ablated=[{"role": "system", "content": "x"}]))
        for body in wrong:
            answer = post(server, "chat/ask", body)
            assert answer.status == 409 and "[invalid-question]" in answer.read().decode()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request(
            "POST", f"/{server.token}/chat/ask", b"{}", {"Content-Length": "99999999", "X-Heretic": "yes"}
        )
        assert connection.getresponse().status == 413
        connection.request("POST", f"/{server.token}/chat/load")
        assert connection.getresponse().status == 403


@pytest.fixture
def ready(tmp_path: Path) -> BrowserChat:
    """A chat that takes a question, but has no thread to answer it."""
    chat = BrowserChat(RunFolder(tmp_path / "mine"))
    chat._phase = "ready"
    return chat


ASKED = Question.model_validate(question())


def test_an_answer_ends_if_the_page_goes_away_before_its_first_byte(ready: BrowserChat) -> None:
    def gone(_: object) -> None:
        raise BrokenPipeError

    with page_of(ready.folder, ready) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("heretic.report.server._Handler.end_headers", gone)
        with pytest.raises(http.client.RemoteDisconnected):
            post(server, "chat/ask", question())
        assert ready.state()["phase"] == "answering" and ready._stop.requested


def test_no_question_is_taken_while_the_model_is_unloaded(ready: BrowserChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heretic.pipeline.actions.start_chat", lambda *_: (None, lambda *_: "a"))
    ready.answer(ASKED)
    asked = ready._asked.get()
    ready.unload()
    assert asked is not None
    ready._reply(None, asked)  # type: ignore[arg-type]
    assert ready.state()["phase"] == "unloading"
    with raises("chat-not-loaded"):
        ready.answer(ASKED)
    with raises("chat-loaded"):
        ready.load()


def test_memory_is_freed_when_nothing_holds_the_failed_answer(
    ready: BrowserChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[set[int]]] = []
    held: list[bool] = []

    def generate(*_: object) -> str:
        cache = {1}
        caches.append(weakref.ref(cache))
        raise MemoryError

    monkeypatch.setattr("heretic.pipeline.actions.start_chat", lambda *_: (None, generate))
    monkeypatch.setattr("heretic.model.batching.free_memory", lambda: held.append(caches[0]() is not None))
    asked = _Asked(ASKED)
    ready._reply(None, asked)  # type: ignore[arg-type]
    assert held == [False]
    assert "[out-of-memory]" in (asked.events.get_nowait() or {})["error"]


def test_it_opens_its_run_and_no_other_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_run(name: str, runs_dir: str, *_: object, **__: object) -> None:
        opened.append(find_run(name, runs_dir).path)
        raise ValueError("red \x1b[31m\nmore")

    for place in ("runs/mine", "mine"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.toml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("heretic.pipeline.actions.open_run", open_run)
    chat = BrowserChat(RunFolder(Path("runs/mine")))
    chat.load()
    assert wait_for(chat, "off")["problem"].endswith(r"red \x1b[31m")
    assert opened == [Path("runs/mine")]


def test_a_failed_import_ends_the_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "heretic.pipeline.actions", None)
    chat = BrowserChat(RunFolder(tmp_path))
    chat.load()
    assert "heretic.pipeline.actions" in wait_for(chat, "off")["problem"]


# One model answers, then none: whether one did, [messages, lines] of each model, and the error after a new state.
HALF_AN_ANSWER = r"""
const whole = post, count = () => MODELS.map(m => [conversations[m].length, byId(m).children.length]);
post = async () => new Response('data: {"model": "original", "text": "a"}\n\ndata: {"error": "E"}\n\n');
return ask('p').then(async one => {
  const half = count();
  post = async () => new Response('data: {"error": "E"}\n\n');
  const none = await ask('p');
  post = whole;
  showChat({ ...chat, phase: 'answering' });
  return [one, half, none, count(), byId('chat-problem').textContent];
});
"""
WHILE_ANSWERING = """
const found = [];
for (const [here, phase] of [[true, 'answering'], [false, 'answering'], [false, 'ready']]) {
  answering = here;
  showChat({ ...chat, phase });
  found.push([byId('trial').disabled, !byId('stop-answer').disabled]);
}
return found;
"""


@pytest.mark.skipif(bool(missing()) and not os.environ.get("CI"), reason=missing())
def test_in_a_browser_two_columns_fill_and_texts_stay_texts(folder: RunFolder, tmp_path: Path) -> None:
    columns = "return ['original', 'ablated'].map(m => document.querySelectorAll(`#${m} .assistant`).length).join()"
    with page_of(folder) as server, open_browser(tmp_path / "profile") as browser:
        browser.command("POST", "/url", url=server.url)
        browser.wait("return document.getElementById('facts').textContent")  # nothing moves under the clicks
        browser.click("#to-chat")
        browser.click("#load")
        browser.wait("return !document.getElementById('send').disabled", 60)
        browser.keys("#prompt", f"{SCRIPT}\ue007")
        browser.wait("return conversations.original.length === 2 && conversations.ablated.length === 2", 60)
        assert browser.js(columns) == "1,1"
        assert browser.js("return document.querySelector('#original .user').textContent") == SCRIPT
        assert not browser.js("return window.hit")
        browser.keys("#prompt", "and now\ue007")
        browser.wait("return conversations.ablated.length === 4 && !answering", 60)
        half = [[6, 6], [4, 4]]
        assert browser.js(HALF_AN_ANSWER) == [True, half, False, half, "E"]
        assert browser.js(WHILE_ANSWERING) == [[True, True], [False, True], [False, False]]
        browser.click("#new")
        assert browser.js(columns) == "0,0"
        browser.click("#unload")
        browser.wait("return !document.getElementById('load').hidden", 30)
        assert [line for line in browser.said() if "favicon" not in line] == []
