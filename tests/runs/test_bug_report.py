"""The file for a bug report."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.runs.bug_report import LOG_LINES, bug_report
from heretic.runs.folder import RunFolder
from tests.helpers.errors import raises

COLLECTED = {"versions": {"heretic": "0"}, "settings": "seed = 3"}


def test_without_a_run_it_holds_the_environment(tmp_path: Path) -> None:
    text = bug_report(COLLECTED, "", str(tmp_path), {})
    assert '"heretic": "0"' in text and "seed = 3" in text
    with raises("run-not-found"):
        bug_report(COLLECTED, "missing", str(tmp_path), {})


def test_it_holds_the_end_of_the_log_without_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "mine", "f")
    folder.path.mkdir()
    (folder.path / "config.toml").write_text('model = "a/b"\n')
    lines = [f"line {i}" for i in range(2 * LOG_LINES)] + ["postgresql://me:hunter2@host/db"]
    (folder.path / "run.log").write_text("\n".join(lines))
    text = bug_report(COLLECTED, "mine", str(tmp_path), {})
    assert f"line {2 * LOG_LINES - 1}" in text and "\nline 0\n" not in text
    assert "hunter2" not in text and "@host/db" in text
    assert "[no-study]" in text, "a run without a study is reported too"
