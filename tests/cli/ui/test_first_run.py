"""`heretic` alone in a folder without config.toml, in a real pseudo-terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.errors import Interrupted
from heretic.settings.sources import resolve
from tests.helpers.terminal import Terminal


def test_three_answers_make_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    terminal = Terminal()
    terminal.answer("Which model?", "not a model", "./tiny")
    terminal.answer("To which folder? [models/tiny-ablated]", "")
    terminal.answer("How many trials at most? [20]", "many", "0", "30")
    assert terminal.end() == 0
    settings = resolve().settings
    assert (settings.model, settings.save_to, settings.n_trials) == ("./tiny", "models/tiny-ablated", 30)


def test_ctrl_c_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    terminal = Terminal()
    terminal.until("Which model?")
    terminal.press_ctrl_c()
    assert terminal.end() == Interrupted.exit_status and not list(tmp_path.glob("config*"))
