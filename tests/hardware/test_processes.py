"""How processes ended."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from heretic.errors import UserError
from heretic.export.programs import run_program
from heretic.hardware.processes import PROBABLE_CAUSE, ending, is_running, process_start
from heretic.interrupt import StopSignal


def ended(*command: str) -> str:
    return ending(subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode)


@pytest.mark.parametrize("script", ["kill -9 $$", "sh -c 'kill -9 $$'; exit $?"])
def test_a_killed_process_is_said_to_be_killed(script: str) -> None:
    assert "SIGKILL" in ended("sh", "-c", script) and PROBABLE_CAUSE in ended("sh", "-c", script)


def test_signals_have_names_and_statuses_numbers() -> None:
    assert "SIGSEGV" in ended("sh", "-c", "kill -SEGV $$")
    assert ended("sh", "-c", "exit 3") == "ended with status 3"
    assert ended("sh", "-c", "exit 130") == "ended with status 130", "our own status after Ctrl-C"
    assert ending(3221225477) == "ended with status 3221225477", "an access violation of Windows"


def test_a_converter_that_is_killed_is_named_with_its_last_words() -> None:
    def failure(_: list[str], message: str) -> UserError:
        return UserError(message, code="failed")

    for script, last in (("echo words; kill -9 $$", "words"), ("kill -9 $$", "")):
        with pytest.raises(UserError) as error:
            run_program(["sh", "-c", script], None, StopSignal(), failure)
        assert "SIGKILL" in error.value.what and last in error.value.what


def test_a_process_that_nobody_has_waited_for_does_not_run() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = process_start(process.pid)
    assert is_running(process.pid, began) and not is_running(process.pid, began - 10)
    process.send_signal(signal.SIGKILL)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    while is_running(process.pid, began):
        pass
    process.wait()
    assert not is_running(process.pid, began)
