"""The full screen: what is on it at which size; that lines are kept where nobody sees a screen."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from heretic.cli.ui.console import PlainReporter
from heretic.cli.ui.dashboard import Dashboard
from heretic.cli.ui.reporters import make_reporter
from heretic.hardware.memory_usage import MemoryUsage, memory_usage
from heretic.interrupt import StopSignal
from tests.helpers.summaries import study_summary

GIB = 2**30


def dashboard(width: int = 100, height: int = 40) -> Dashboard:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    return Dashboard(console, "owner/model", StopSignal(), lambda: [MemoryUsage("GPU 0", 20 * GIB, 24 * GIB)])


def seen(shown: Dashboard) -> str:
    console = Console(file=io.StringIO(), width=shown.console.width, color_system=None)
    console.print(shown.render())
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_everything_is_on_the_screen_while_a_study_runs() -> None:
    shown = dashboard()
    with shown.stage("Trials", 200) as stage:
        stage.advance(7)
        shown.study_updated(study_summary())
        shown.warning("memory ran \x1b[2J out")
        shown.info("Trial 6 (7 of 200)")
        with shown.stage("Refusals", 50):
            text = seen(shown)
            for part in ("owner/model", "Trials", "7/200", "Refusals", "7 of 200, 1 failed", "120 trials per hour",
                         "1 h 36 min", "trial 2: 12 of 50 refused, KL 0.0300", "44 of 50", "20.0 GiB of 24.0 GiB",
                         "◆", "KL divergence", "memory ran", "Trial 6"):  # fmt: skip
                assert part in text, part
            assert "\x1b" not in text
            shown.stop.requested = True
            assert "Ctrl-C again stops at once" in seen(shown)
    out = shown.console.file.getvalue()  # type: ignore[attr-defined]
    assert out.index("\x1b[?1049h") < out.index("\x1b[?1049l"), "the terminal's own screen comes back"
    assert "memory ran" in out[out.index("\x1b[?1049l") :], "warnings can be read afterwards"
    assert "Trial 6" not in out[out.index("\x1b[?1049l") :]


@pytest.mark.parametrize(("width", "height"), [(100, 40), (60, 18), (40, 12), (30, 6), (10, 3)])
def test_it_fits_whatever_the_size_and_the_trials_come_first(width: int, height: int) -> None:
    shown = dashboard(width, height)
    with shown.stage("Trials", 200):
        shown.study_updated(study_summary())
        shown.warning("w " * 100)
        for line in ("a", "b", "c"):
            shown.info(line)
        text = seen(shown)
        assert len(text.splitlines()) <= height
        if height >= 12:
            assert "7 of 200" in text


def test_before_the_study_and_after_it_lines_are_lines() -> None:
    shown = dashboard()
    with shown.stage("Loading", None):
        shown.info("a fact")
    shown.warning("a warning")
    out = shown.console.file.getvalue()  # type: ignore[attr-defined]
    assert "a fact" in out and out.count("a warning") == 1 and "\x1b[?1049h" not in out


def test_an_error_gives_the_terminal_back() -> None:
    shown = dashboard()
    with pytest.raises(ZeroDivisionError), shown.stage("Trials", 2):
        shown.study_updated(study_summary())
        raise ZeroDivisionError
    assert shown.live is None and shown.console.file.getvalue().count("\x1b[?1049l") == 1  # type: ignore[attr-defined]


def test_the_log_gets_the_same_lines_either_way(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "heretic")
    logged = []
    for reporter in (dashboard(), PlainReporter(Console(file=io.StringIO()))):
        caplog.clear()
        with reporter.stage("Trials", 2):
            reporter.study_updated(study_summary())
            reporter.info("said")
            reporter.warning("warned")
        logged.append([(r.levelname, r.getMessage().split(":")[0]) for r in caplog.records])
    assert logged[0] == logged[1] == [("INFO", "said"), ("WARNING", "warned"), ("INFO", "Trials")]


def test_what_an_earlier_session_did_says_nothing_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    console, clock = Console(file=io.StringIO(), width=100), [0.0]
    monkeypatch.setattr("heretic.cli.ui.console.time.monotonic", lambda: clock[0])
    with PlainReporter(console).stage("Trials", 200) as stage:
        stage.advance(150)
        for _ in range(2):
            clock[0] += 60
            stage.advance()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "151 of 200, about 49 min 0 s left" in text and "152 of 200, about 48 min 0 s left" in text


def test_a_file_is_no_terminal_even_with_colors_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_reporter(Console(file=io.StringIO())), PlainReporter)


def test_memory_of_this_machine() -> None:
    ram = memory_usage()[-1]
    assert ram.device == "RAM" and 0 < (ram.own or 0) <= ram.used <= ram.total
