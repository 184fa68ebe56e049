"""The note on the session at work: written, removed, and read after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from heretic.errors import Interrupted, UserError
from heretic.pipeline.session_note import FILE, noted_session
from heretic.pipeline.worker_process import PARENT_VARIABLE
from heretic.settings import Settings
from heretic.storage.rdb import worker
from tests.helpers.reporters import RecordingReporter

LEFT = {"process": {**worker(), "began": 1.0}, "stage": "Trials", "batch_size": 32, "free": 3 << 30}


def inputs_in(folder: Path, storage: str = "") -> Any:
    return SimpleNamespace(
        settings=Settings(storage=storage), folder=SimpleNamespace(path=folder), plan=SimpleNamespace(batch_size=8)
    )


def warnings_of(folder: Path, storage: str = "") -> list[str]:
    reporter = RecordingReporter()
    with noted_session(inputs_in(folder, storage), reporter):
        pass
    return reporter.warnings


@pytest.mark.parametrize("error", [None, UserError("x"), Interrupted(), KeyboardInterrupt(), ZeroDivisionError()])
def test_no_end_but_a_kill_leaves_the_note(tmp_path: Path, error: BaseException | None) -> None:
    file = tmp_path / FILE
    try:
        with noted_session(inputs_in(tmp_path), RecordingReporter()) as noting:
            for name in ("A", "B"):
                with noting.stage(name, 1), noting.stage("within", None):
                    assert json.loads(file.read_text())["stage"] == name
            assert json.loads(file.read_text())["batch_size"] == 8
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    assert not list(tmp_path.glob("*session*")) and not warnings_of(tmp_path)


def test_a_session_that_was_killed_is_said_once(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(LEFT))
    (warning,) = warnings_of(tmp_path)
    assert "'Trials'" in warning and "batch_size = 32" in warning and "3.0 GiB" in warning
    assert not warnings_of(tmp_path)


def test_nothing_is_said_of_a_running_session_nor_by_workers_or_studies_on_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_text(json.dumps(LEFT))
    assert not warnings_of(tmp_path, "postgresql://host/database")
    with monkeypatch.context() as patched:
        patched.setenv(PARENT_VARIABLE, "1")
        assert not warnings_of(tmp_path)
    assert (tmp_path / FILE).exists()
    (tmp_path / FILE).write_text(json.dumps({**LEFT, "process": worker()}))
    assert not warnings_of(tmp_path), "the folder is a copy"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "1", "[" * 9000, "{}", "x" * 99999, '"\\ud800"', json.dumps({**LEFT, "process": "x"})]
    + [json.dumps({**LEFT, key: value}) for key in ("batch_size", "free") for value in ("x", None, [], float("inf"))]
    + [json.dumps({**LEFT, "process": {**worker(), "pid": pid}}) for pid in ("x", -1, None)],
)
def test_a_damaged_note_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert not warnings_of(tmp_path)


def test_a_note_controls_no_terminal_and_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({**LEFT, "stage": "\x1b[2J\ud800" * 99}))
    (warning,) = warnings_of(tmp_path)
    assert warning.isprintable() and len(warning) < 600
    (tmp_path / FILE).mkdir()  # root may write everywhere
    assert not warnings_of(tmp_path)
    assert not warnings_of(tmp_path / "missing")
