"""OpenMP's threads wait passively, unless the user has said how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from heretic.machine.threads import PASSIVE_WAITING, wait_passively

# The command's own `main`, stopped where the first command would import torch: what the runtimes would read there.
AT_IMPORT = """
import json, os, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps({k: os.environ.get(k) for k in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Stop())
sys.argv = ["heretic", "doctor"]
from heretic.cli import main
main()
"""


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, '{"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}'),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, '{"OMP_WAIT_POLICY": "ACTIVE", "KMP_BLOCKTIME": null}'),
    ],
)
def test_waiting_is_passive_when_torch_is_imported(own: dict[str, str], expected: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in PASSIVE_WAITING} | own
    done = subprocess.run(
        [sys.executable, "-c", AT_IMPORT], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"KMP_BLOCKTIME": "200"}, {"GOMP_SPINCOUNT": "1000"}])
def test_what_the_user_has_set_stays(own: dict[str, str]) -> None:
    environment = dict(own)
    wait_passively(environment)
    assert environment == own
