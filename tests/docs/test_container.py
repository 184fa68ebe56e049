"""The Dockerfile, as far as it can be checked without Docker: what it copies is there, and its shell steps can be parsed."""

from __future__ import annotations

import fnmatch
import re
import subprocess

import pytest

from tests.docs.pages import ROOT

TEXT = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
STEPS = [step.replace("\\\n", "\n") for step in re.findall(r"^\w+ (?:.*\\\n)*.*", TEXT, flags=re.M)]
NEEDED = ("Makefile", "README.md", "LICENSE", "pyproject.toml", "lock/packages.txt", "scripts/known.py", "src/heretic")


def test_only_known_instructions_occur_in_an_order_that_builds() -> None:
    names = [step.split()[0] for step in STEPS]
    known = {"FROM", "SHELL", "RUN", "COPY", "ARG", "ENV", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert names[0] == "FROM" and set(names) <= known
    assert names.count("ENTRYPOINT") == names.count("CMD") == 1
    assert names.index("COPY") < max(i for i, step in enumerate(STEPS) if "make " in step)
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN"), "root installs, a user runs"


@pytest.mark.parametrize("step", [s for s in STEPS if s.startswith("RUN")], ids=lambda s: " ".join(s.split()[1:3]))
def test_steps_are_valid_shell(step: str) -> None:
    script = step.removeprefix("RUN ").replace("\n", "\\\n")
    checked = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", NEEDED)
def test_what_the_installation_reads_is_not_ignored(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*" and (ROOT / name).exists()
    taken = [p.removeprefix("!") for p in patterns if p.startswith("!")]
    assert any(fnmatch.fnmatch(name, p) or name.startswith(f"{p}/") for p in taken)
