"""The live page: who may read it, what it shows, what it can do; and once in a real browser beside a running study."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from heretic.hardware import locks
from heretic.interrupt import StopSignal
from heretic.pipeline.browser_chat import BrowserChat
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.report.server import LiveServer, open_server
from heretic.runs.folder import RunFolder, find_run
from heretic.settings.sources import resolve
from tests.helpers.browser import browser as open_browser
from tests.helpers.browser import missing
from tests.helpers.command import start
from tests.helpers.errors import raises
from tests.helpers.serving import serving


@contextmanager
def page_of(folder: RunFolder) -> Iterator[LiveServer]:
    server = open_server(folder, "runs", os.environ, BrowserChat(folder))
    with serving(server):
        yield server


@pytest.fixture
def finished(config: Path) -> Iterator[LiveServer]:
    """The page of a finished run of two trials."""
    run(resolve(config, {"n_trials": 2, "run_name": "mine"}), reporter=NULL_REPORTER, stop=StopSignal())
    with page_of(find_run("mine", "runs")) as server:
        yield server


def ask(server: LiveServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    host = headers.pop("Host", f"127.0.0.1:{server.port}")
    connection.request(method, path, headers={"Host": host, **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def first_event(server: LiveServer) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", f"/{server.token}/events")
    line = connection.getresponse().readline().decode()
    connection.close()
    return dict(json.loads(line.removeprefix("data: ")))


def test_only_the_holder_of_the_address_reads_it(finished: LiveServer) -> None:
    assert finished.server_address[0] == "127.0.0.1"
    assert ask(finished, "/")[0] == ask(finished, "/wrong/")[0] == ask(finished, "/wrong/events")[0] == 403
    assert ask(finished, f"/{finished.token}/", Host="evil.example:80")[0] == 403
    assert ask(finished, f"/{finished.token}/other")[0] == 404
    status, page = ask(finished, f"/{finished.token}/")
    assert status == 200 and "EventSource" in page and finished.token not in page


def test_it_shows_status_report_and_log(finished: LiveServer) -> None:
    state = first_event(finished)
    assert state["status"]["n_complete"] == 2 and not state["can_stop"] and not state["can_continue"]  # type: ignore[index]
    status, report = ask(finished, f"/{finished.token}/report?2")
    assert status == 200 and "Pareto front" in report


def test_actions_need_a_header_that_other_sites_cannot_send(finished: LiveServer) -> None:
    assert ask(finished, f"/{finished.token}/stop", "POST")[0] == 403
    status, text = ask(finished, f"/{finished.token}/stop", "POST", **{"X-Heretic": "yes"})
    assert status == 409 and "[run-not-active]" in text


def test_stop_reaches_the_process_that_holds_the_run(finished: LiveServer) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = locks.LockOwner(holder.pid, os.uname().nodename, "heretic run", "m", "now")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "lock_owner", lambda _: owner)
        assert first_event(finished)["can_stop"]
        assert ask(finished, f"/{finished.token}/stop", "POST", **{"X-Heretic": "yes"})[0] == 200
        assert holder.wait(20) == -signal.SIGTERM
        assert not first_event(finished)["can_stop"], "it is asked once"
        assert ask(finished, f"/{finished.token}/continue", "POST", **{"X-Heretic": "yes"})[0] == 409


def test_a_port_in_use_is_an_error(finished: LiveServer) -> None:
    with raises("port-unavailable"):
        open_server(finished.run.folder, "runs", os.environ, finished.run.chat, finished.port)


@pytest.mark.skipif(bool(missing()) and not os.environ.get("CI"), reason=missing())
def test_in_a_browser_a_study_is_watched_and_stopped(config: Path, tmp_path: Path) -> None:
    study = start("run", "--run-name", "mine", "--trials", "40", "--set", "max_response_length=60", "--plain")
    end = time.monotonic() + 90
    while not Path("runs/mine/config.toml").exists():
        assert time.monotonic() < end and study.poll() is None
        time.sleep(0.1)
    with page_of(find_run("mine", "runs")) as server, open_browser(tmp_path / "profile") as browser:
        browser.command("POST", "/url", url=server.url)
        browser.wait("return document.getElementById('facts').textContent.includes('of 40')", 60)
        browser.wait(
            "return document.getElementById('report').contentDocument.body.textContent.includes('Overview')", 60
        )
        browser.js("window.confirm = () => true")
        browser.click("#stop")
        assert study.wait(60) == 130
        browser.wait("return !document.getElementById('continue').hidden", 30)
