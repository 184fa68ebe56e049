"""The workflow files for GitHub run commands that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import yaml

from tests.docs.pages import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def commands(path) -> Iterator[str]:  # type: ignore[no-untyped-def]
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_make_target_exists(path) -> None:  # type: ignore[no-untyped-def]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wanted = {target for command in commands(path) for target in re.findall(r"^make ([a-z -]+)$", command, re.M)}
    assert wanted and wanted <= targets


def test_all_supported_versions_of_python_are_tested() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert jobs["test"]["strategy"]["matrix"]["python"] == (named or ["3.10", "3.11", "3.12", "3.13"])


def test_the_bug_form_asks_for_doctor() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
    assert any(field.get("id") == "doctor" and field["validations"]["required"] for field in form["body"])
