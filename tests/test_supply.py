"""What is installed is what is locked, with hashes, licenses and an SBOM. `make lock` and scripts/supply.py make the files anew."""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SUPPLY = runpy.run_path(str(ROOT / "scripts/supply.py"))
KNOWN = runpy.run_path(str(ROOT / "scripts/known.py"))
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def locked() -> dict[str, str]:
    """Version by name, of what the lock files name for this interpreter and machine."""
    found = {}
    for file in (ROOT / "lock").glob("*.txt"):
        for line in re.findall(r"^[\w.-]+==.*$", file.read_text(), re.M):
            requirement = Requirement(line.removesuffix("\\").strip())
            if requirement.marker is None or requirement.marker.evaluate():
                found[str(canonicalize_name(requirement.name))] = str(requirement.specifier).removeprefix("==")
    return found


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for to run and to develop, with the extras that development takes in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["dev"]]
    for own in (Requirement(line) for line in extras["dev"] if line.startswith("heretic[")):
        lines += [line for extra in own.extras for line in extras[extra]]
    return [Requirement(line) for line in lines if not line.startswith("heretic[")]


def test_every_entry_has_hashes_and_every_requirement_an_entry() -> None:
    names = set()
    for file in (ROOT / "lock").glob("*.txt"):
        for name, _, hashes in SUPPLY["entries"](file):
            assert hashes, f"{file.name}: {name} has no hash"
            names.add(name)
    for requirement in requirements():
        assert canonicalize_name(requirement.name) in names, f"{requirement.name} is not in lock/: make lock"


def test_no_package_without_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    assert listed
    for line in listed[1].strip().splitlines():
        assert re.search(r"\",\s+# \w", line), f"say why: {line.strip()}"


def test_the_lock_says_what_the_constraints_say() -> None:
    versions = locked()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#") or not line:
            continue
        requirement = Requirement(line)
        name = str(canonicalize_name(requirement.name))
        if name in versions and (requirement.marker is None or requirement.marker.evaluate()):
            assert requirement.specifier.contains(versions[name], prereleases=True), f"{name}: make lock"


def test_what_is_installed_is_what_is_locked() -> None:
    versions, wrong = locked(), []
    for name, package in SUPPLY["closure"]("dev").items():
        if (
            name in versions
            and package.version.partition("+")[0] != versions[name]
            and name not in ("setuptools", "pip")
        ):
            wrong.append(f"{name} {package.version}, locked is {versions[name]}")
    assert not wrong, "; ".join(wrong)


def test_every_package_has_a_license_and_a_line() -> None:
    text = (ROOT / "docs/licenses.md").read_text()
    for name, package in SUPPLY["closure"]("dev").items():
        assert package.license, f"{name}: name its license in TOLD of scripts/supply.py"
        assert name == "heretic" or re.search(rf"[| ]{re.escape(name)}[,|]", text), (
            f"{name}: python scripts/supply.py licenses"
        )


def test_the_sbom_names_everything_that_runs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts/supply.py"), "sbom", str(tmp_path)], check=True)
    (file,) = tmp_path.glob("heretic-*.cdx.json")
    bom: dict[str, Any] = json.loads(file.read_text())
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    named = {c["name"]: c["version"] for c in bom["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            name = str(canonicalize_name(requirement.name))
            assert named[name] == importlib.metadata.version(name)
    known = {c["bom-ref"] for c in (*bom["components"], bom["metadata"]["component"])}
    assert {d["ref"] for d in bom["dependencies"]} == known
    assert all(set(d["dependsOn"]) <= known for d in bom["dependencies"])


def test_a_build_of_pytorch_that_nobody_knows_is_found() -> None:
    lock = (ROOT / "lock/torch.txt").read_text()
    known = re.findall(r"sha256:(\w+)", lock)[0]

    def report(digest: str) -> str:
        taken = {"url": "https://x/torch.whl", "archive_info": {"hashes": {"sha256": digest}}}
        return json.dumps({"install": [{"download_info": taken}]})

    assert KNOWN["unknown"](report(known), lock) == []
    assert KNOWN["unknown"](report("0" * 64), lock) == ["https://x/torch.whl"]
    assert KNOWN["unknown"](json.dumps({"install": []}), lock) == []


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_has_one_version_of_each(version: str) -> None:
    environment = {"python_version": version, "python_full_version": f"{version}.9"}
    seen: dict[str, str] = {}
    for line in re.findall(r"^[\w.-]+==.*$", (ROOT / "lock/packages.txt").read_text(), re.M):
        name, _, rest = line.removesuffix("\\").partition("==")
        marker = rest.partition(";")[2].strip()
        if not marker or Marker(marker).evaluate(environment):
            assert name not in seen, f"{name} twice"
            seen[name] = rest
    assert {"transformers", "numpy", "optuna", "pydantic"} <= set(seen)
