"""What a person sees and types, in a real pseudo-terminal; and what the menu does with what goes wrong."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from types import MappingProxyType

import optuna
import pexpect
import pytest
from optuna.trial import TrialState
from rich.console import Console

from heretic.cli.ui import menu as menu_module
from heretic.cli.ui.menu import ACTIONS, Menu
from heretic.errors import Interrupted, UserError
from heretic.interrupt import StopSignal
from heretic.pipeline.run_context import RunContext
from heretic.runs.status import read_status
from heretic.storage.rdb import fail_abandoned
from tests.helpers.terminal import Terminal

# Long enough to be looked at and stopped in the middle.
SLOW = (
    "run",
    "--run-name",
    "mine",
    "--trials",
    "40",
    "--set",
    "max_response_length=100",
    "--set",
    'refusal_markers=["zz"]',
)


def test_from_the_screen_to_the_menu_to_an_export(config: Path) -> None:
    terminal = Terminal(*SLOW)
    terminal.until("trials per hour")
    terminal.until("RAM")
    terminal.until("KL divergence")  # a frame arrives in pieces
    assert terminal.full_screen and "heretic ·" in terminal.text and "KL divergence" in terminal.text
    terminal.resize(20, 60)
    terminal.until("KL divergence          ", 10)
    lines = terminal.text.splitlines()
    assert sum("trials per hour" in line for line in lines) == 1, "the new size is drawn anew, not below the old one"
    terminal.resize(40, 100)
    terminal.press_ctrl_c()
    terminal.answer("What next?", "more")
    assert not terminal.full_screen
    done = read_status("mine", "runs", {}).summary.n_complete
    assert 0 < done < 40, "Ctrl-C did not end the study in the middle"
    terminal.answer("How many more trials? [", "2")
    terminal.answer("What next?", "nonsense", "4")
    assert terminal.raw.count(b"\x1b[?1049h") == 2, "the study has its screen again"
    terminal.answer("Which trial? [", "0")
    terminal.answer("In which format? [full]", "")
    terminal.answer("To which folder? [runs/mine/models/trial-0]", "")
    terminal.until("reloaded from disk")
    terminal.answer("What next?", "chat")
    terminal.answer("Which trial?", "0")
    terminal.answer(">", "make bread", "/save", "/quit")
    terminal.answer("What next?", "q")
    assert terminal.end() == 0, "the study came to what was asked for last"
    assert "number from 1 to" in terminal.said and "Traceback" not in terminal.said
    assert json.loads(Path("runs/mine/models/trial-0/manifest.json").read_text())["trial"] == 0
    assert len(json.loads(Path("runs/mine/chat.json").read_text())) == 2
    summary = read_status("mine", "runs", {}).summary
    assert summary.n_complete == summary.n_trials == done + 2
    assert {p.name for p in Path().iterdir()} == {"config.toml", "runs"}, "something was written outside the run"
    log = Path("runs/mine/run.log").read_text()
    assert log.count("refused, KL") == done + 2 and "Traceback" not in log


def test_twice_ends_it_at_once_and_the_menu_can_be_left_out(config: Path) -> None:
    terminal = Terminal(*SLOW, "--no-menu")
    terminal.until("trials per hour")
    terminal.press_ctrl_c()
    time.sleep(0.03)  # sooner, the system makes one signal of the two
    terminal.press_ctrl_c()
    assert terminal.end() == Interrupted.exit_status
    assert not terminal.full_screen and "Stopped." in terminal.said and "What next?" not in terminal.said
    study = optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db")
    kept = [t for t in study.get_trials() if t.state == TrialState.COMPLETE]
    assert kept and all("heretic:scores" in t.user_attrs for t in kept)
    fail_abandoned(study)  # as the next session does, where the second Ctrl-C came before the trial was marked
    assert {t.state for t in study.get_trials()} <= {TrialState.COMPLETE, TrialState.FAIL}


class Asked(Console):
    """Answers by itself; an exception among the answers is raised."""

    def __init__(self, *answers: str | BaseException) -> None:
        super().__init__(record=True, width=100, quiet=True)
        self.answers = list(answers)

    def input(self, *_: object, **__: object) -> str:  # type: ignore[override]
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Bare(RunContext):
    """A run context with nothing but a stop signal."""

    def __init__(self) -> None:
        self.stop = StopSignal()

    results = ()  # type: ignore[assignment]
    original_refusals = None
    original_values = MappingProxyType({})  # type: ignore[assignment]
    selected = lambda self: None  # type: ignore[assignment]  # noqa: E731
    folder = type("Folder", (), {"path": Path("runs/mine")})  # type: ignore[assignment]


def test_what_goes_wrong_in_an_action_leads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    run_context = Bare()
    raised: list[BaseException] = [
        UserError("no room", fix="make room"),
        KeyboardInterrupt(),
        EOFError(),
        Interrupted(),
    ]

    def failing(_: Menu) -> None:
        error = raised.pop(0)
        if isinstance(error, Interrupted):
            run_context.stop.requested = run_context.stop.from_keyboard = True
        raise error

    monkeypatch.setattr(menu_module, "ACTIONS", (("fail", "", failing),))
    console = Asked("1", "f", "fail", "1", KeyboardInterrupt())
    Menu(console, run_context).run()
    assert not raised and not console.answers and not run_context.stop.requested


def test_a_termination_ends_the_menu(monkeypatch: pytest.MonkeyPatch) -> None:
    run_context = Bare()

    class Terminated(Asked):
        def input(self, *_: object, **__: object) -> str:  # type: ignore[override]
            run_context.stop.requested = True
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        Menu(Terminated(), run_context).run()


def test_every_action_of_the_menu_is_a_command_too() -> None:
    from heretic.cli import main as cli

    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    assert {name for name, _, _ in ACTIONS} - {"more"} <= commands  # more trials: heretic run RUN --trials +50


def test_ctrl_z_gives_the_terminal_back_until_the_run_continues(config: Path) -> None:
    """In a shell: a session's first process cannot be stopped."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "PS1": "shell> "}
    shell = pexpect.spawn("bash", ["--norc", "-i"], env=environment, dimensions=(40, 100), timeout=60)
    shell.expect_exact("shell> ")
    shell.sendline(shlex.join([sys.executable, "-m", "heretic", *SLOW, "--no-menu"]))
    shell.expect_exact("\x1b[?1049h")
    shell.expect_exact("trials per hour")
    shell.send("\x1a")
    shell.expect_exact("\x1b[?1049l")
    shell.expect_exact("shell> ")
    shell.sendline("fg")
    shell.expect_exact("\x1b[?1049h")
    shell.expect_exact("trials per hour")
    shell.send("\x03")
    shell.expect_exact("\x1b[?1049l")
    shell.expect_exact("shell> ")
    shell.sendline("exit $?")
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == Interrupted.exit_status
