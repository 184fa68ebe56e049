"""Where somebody can be asked: a pseudo-terminal alone does not tell."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from heretic.cli.main import ERRORS_PAGE
from heretic.cli.ui.chat import input_lines, require_input
from heretic.cli.ui.console import PipeConsole, PlainReporter, is_interactive, non_interactive_reason, notebook
from heretic.cli.ui.outcome import check_answerable
from heretic.cli.ui.reporters import make_reporter
from heretic.errors import UserError
from tests.helpers.terminal import Terminal

NOBODY = [
    ("JPY_PARENT_PID", "17"),
    ("JPY_SESSION_NAME", "/a.ipynb"),
    ("COLAB_RELEASE_TAG", "release"),
    ("KAGGLE_KERNEL_RUN_TYPE", "Interactive"),
    ("KAGGLE_URL_BASE", "https://www.kaggle.com"),
    ("CI", "true"),
    ("TERM", "dumb"),
    ("TERM", "xterm-color"),
]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard input is a pseudo-terminal."""
    leader, follower = pty.openpty()
    with open(follower) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield
    os.close(leader)


def test_a_terminal_is_asked(terminal: None) -> None:
    assert is_interactive() and not notebook()
    require_input()


@pytest.mark.parametrize(("name", "value"), NOBODY)
def test_a_pseudo_terminal_where_nobody_can_type_is_not_asked(
    name: str, value: str, terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert not is_interactive() and non_interactive_reason()
    with pytest.raises(UserError) as error:
        require_input()
    assert error.value.code == "nobody-to-ask"
    with pytest.raises(UserError) as error:
        check_answerable(Console(force_terminal=True, file=io.StringIO()), yes=False)
    assert error.value.code == "nobody-to-ask"


@pytest.mark.parametrize(
    ("name", "value"), [("CI", "false"), ("CI", ""), ("KAGGLE_USERNAME", "me"), ("KAGGLE_KEY", "x")]
)
def test_what_people_set_on_their_own_machine_stops_no_question(
    name: str, value: str, terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert is_interactive()


def test_input_that_is_closed_or_none_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stdin in (None, closed, io.StringIO("a line")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert not is_interactive()
        require_input()  # a pipe ends by itself
    for stdin in (None, closed):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert list(input_lines(Console(file=io.StringIO()))) == []


def test_a_command_in_the_background_is_not_asked(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from heretic.cli.ui.console import non_interactive_reason
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            print("first:", repr(non_interactive_reason()))
            if os.fork() == 0:
                os.setpgid(0, 0)
                print("second:", repr(non_interactive_reason()), flush=True)
                os._exit(0)
            os.wait()
            """
        )
    )
    leader, follower = pty.openpty()
    ran = subprocess.run(
        [sys.executable, "-c", f"import os; os.setsid(); import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
         f"exec(open({str(program)!r}).read())"],
        stdin=follower, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    os.close(leader)
    os.close(follower)
    assert "first: ''" in ran.stdout, ran
    assert "background" in ran.stdout.split("second:")[1]


def test_a_notebook_gets_plain_lines(terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_PARENT_PID", "17")
    leader, follower = pty.openpty()
    with open(follower, "w") as out:
        assert isinstance(make_reporter(Console(file=out, force_terminal=True)), PlainReporter)
    os.close(leader)


def test_a_run_in_a_notebook_ends_without_a_menu(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_PARENT_PID", "17")
    terminal = Terminal("run", "--trials", "1")
    assert terminal.end() == 0
    assert "What next?" not in terminal.said and "No menu" in terminal.said
    assert "heretic ·" not in terminal.said and b"\x1b[?1049h" not in terminal.raw


def test_a_terminal_opens_the_page_of_errors_from_a_code(tmp_path: Path) -> None:
    terminal = Terminal("report", "nothing", "-o", "r.html")
    assert terminal.end() == 1 and "[run-not-found]" in terminal.said
    assert f"{ERRORS_PAGE.as_uri()}\x1b".encode() in terminal.raw and ERRORS_PAGE.exists()


def test_long_work_goes_on_after_its_terminal_is_gone() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as file:
        console = PipeConsole(file=file, force_terminal=True)
        console.long_work = True
        console.print("one")
        os.close(ours)
        for _ in range(3):
            console.print("two")
        assert console.quiet
