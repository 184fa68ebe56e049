"""Running the command: in this process where a test only looks at what it says, as a process of its own where it is killed."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass

import pytest

from heretic.cli import main as cli
from tests.helpers.fork_server import ForkedProcess, fork_heretic


@dataclass
class Ran:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str

    @property
    def code(self) -> str:
        """The code of the error that was printed; empty without one."""
        found = re.search(r"\[([a-z0-9]+(?:-[a-z0-9]+)*)\](?: Where: | To fix: |$)", self.err)
        return found[1] if found else ""


def heretic(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Ran:
    """Run `heretic ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["heretic", *arguments])
    with pytest.raises(SystemExit) as finished:
        cli.main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return Ran(int(finished.value.code or 0), " ".join(printed.out.split()), " ".join(printed.err.split()))


def start(*arguments: str) -> ForkedProcess:
    """Start `heretic ARGUMENTS` as a process, a fork of one that has imported the libraries."""
    return fork_heretic(arguments, os.environ)
