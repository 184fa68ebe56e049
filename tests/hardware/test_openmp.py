"""How PyTorch's threads wait: the environment at the moment at which PyTorch is imported, by every way into heretic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from heretic.hardware.openmp import CHOICES, PASSIVE

SPY = f"""
import json, os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps({{n: os.environ[n] for n in {CHOICES!r} if n in os.environ}}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Spy())
"""
COMMAND = 'sys.argv = ["heretic", "doctor"]\n'
ENTRIES = {
    "the command": COMMAND + "from heretic.cli.main import main; main()",
    "the module": COMMAND + "import runpy; runpy.run_module('heretic', run_name='__main__')",
    "Python": "from heretic import load",
    "a benchmark": "sys.path.insert(0, 'benchmarks'); import common",
}


def at_import(code: str, **chosen: str) -> dict[str, str]:
    """What of the environment PyTorch would see."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES} | chosen
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SPY + code], env=environment, capture_output=True, text=True, cwd=root, timeout=60
    )
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("entry", ENTRIES)
def test_threads_wait_passively_by_every_entry(entry: str) -> None:
    assert at_import(ENTRIES[entry]) == PASSIVE


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_of_the_user_is_kept(name: str) -> None:
    assert at_import(ENTRIES["the command"], **{name: "7"}) == {name: "7"}


def test_importing_heretic_alone_changes_nothing() -> None:
    assert at_import("import heretic; import torch") == {}


def test_nothing_is_set_once_pytorch_is_imported() -> None:
    code = "import types; sys.modules['torch'] = types.ModuleType('torch')\nfrom heretic.hardware.openmp import wait_passively\n"
    assert at_import(code + "wait_passively(); del sys.modules['torch']; import torch") == {}
