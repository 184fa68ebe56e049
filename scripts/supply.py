"""Make docs/licenses.md, and the SBOM beside the wheel.

    python scripts/supply.py licenses        write docs/licenses.md
    python scripts/supply.py sbom FOLDER     write FOLDER/heretic-VERSION.cdx.json, CycloneDX 1.6

Both are read from the metadata of what is installed, followed from this package; the hashes of the SBOM from lock/.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Licenses that the metadata does not state briefly, read from the license file that it installs.
TOLD = {
    "mbstrdecoder": "MIT",
    "sqlitedict": "Apache-2.0",
    "word2number": "MIT",
    "rouge-score": "Apache-2.0",
}


@dataclass
class Package:
    """An installed package, its license, and what it asks for."""

    name: str
    version: str
    license: str
    summary: str
    needs: set[str] = field(default_factory=set)


def closure(*extras: str) -> dict[str, Package]:
    """Every installed package that heretic with these extras needs, heretic first, by canonical name."""
    found: dict[str, Package] = {}
    waiting = [("heretic", frozenset(extras), "")]
    seen = set()
    while waiting:
        asked, wanted, by = waiting.pop()
        name = str(canonicalize_name(asked))
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # its marker holds elsewhere, or an extra that is not installed
        found.setdefault(
            name, Package(metadata["Name"], metadata["Version"], license_of(metadata), metadata["Summary"] or "")
        )
        if by and by != name:
            found[by].needs.add(name)
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                waiting.append((requirement.name, frozenset(requirement.extras), name))
    return found


def license_of(metadata: Any) -> str:
    """Return the license in a few words: its SPDX expression, else the classifiers, else the first line of the field."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    if told := TOLD.get(str(canonicalize_name(metadata["Name"]))):
        return told
    named = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    named = [n for n in named if n != "OSI Approved"]
    first = (metadata.get("License") or "").strip().split("\n")[0]
    return " or ".join(named) or (first if len(first) < 60 else first[:60] + " …")


def licenses() -> str:
    """Return docs/licenses.md."""
    run, dev = closure(), closure("dev")
    lines = [
        "# Licenses",
        "",
        "heretic is licensed under Apache-2.0 and contains none of these packages. Their versions are in `constraints.txt`, the",
        "hashes in `lock/`. PyTorch's CUDA builds also install NVIDIA's libraries, under NVIDIA's own terms (`lock/cuda.txt`).",
        "Made by `python scripts/supply.py licenses` from the packages installed on Linux with Python 3.11.",
        "",
    ]
    for title, names in (
        ("To run heretic", set(run)),
        ("For `heretic benchmark`, development and tests (`.[dev]`)", set(dev) - set(run)),
    ):
        by_license: dict[str, list[str]] = {}
        for name in sorted(names - {"heretic"}):
            by_license.setdefault(dev[name].license.replace("|", "/"), []).append(name)
        lines += [f"## {title}", "", "|license|packages|", "|---|---|"]
        lines += [f"|{license_name}|{', '.join(by_license[license_name])}|" for license_name in sorted(by_license)]
        lines.append("")
    return "\n".join(lines)


def sbom() -> dict[str, Any]:
    """CycloneDX 1.6 (ECMA-424): what the wheel needs at run time, as installed here."""
    found = closure()
    hashes = locked()
    own = found.pop("heretic")
    components = []
    for name, package in sorted(found.items()):
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": reference(package),
            "name": name,
            "version": package.version,
            "description": package.summary,
            "purl": reference(package),
            "licenses": [{"license": {"name": package.license}}],
        }
        if digests := hashes.get((name, package.version.partition("+")[0])):
            files = [{"type": "distribution", "url": f"https://pypi.org/project/{name}/{package.version}/"}]
            component["externalReferences"] = [
                {**file, "hashes": [{"alg": "SHA-256", "content": d} for d in digests]} for file in files
            ]
        components.append(component)
    refs = {name: reference(package) for name, package in {**found, "heretic": own}.items()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": refs["heretic"],
                "name": "heretic",
                "version": own.version,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                "purl": refs["heretic"],
            }
        },
        "components": components,
        "dependencies": [
            {"ref": refs[name], "dependsOn": sorted(refs[n] for n in package.needs)}
            for name, package in sorted({**found, "heretic": own}.items())
        ],
    }


def reference(package: Package) -> str:
    """Package URL (purl) on PyPI."""
    return f"pkg:pypi/{canonicalize_name(package.name)}@{package.version.replace('+', '%2B')}"


def locked() -> dict[tuple[str, str], list[str]]:
    """Hashes of the files of every release in lock/, by name and version."""
    found = {}
    for file in sorted((ROOT / "lock").glob("*.txt")):
        for name, version, hashes in entries(file):
            found[name, version] = hashes
    return found


def entries(file: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Name, version and hashes of each entry of a lock file."""
    for entry in re.split(r"\n(?=\w)", file.read_text(encoding="utf-8")):
        if match := re.match(r"([\w.-]+)==([^\s;]+)", entry):
            yield str(canonicalize_name(match[1])), match[2], re.findall(r"sha256:([0-9a-f]{64})", entry)


if __name__ == "__main__":
    if sys.argv[1:] == ["licenses"]:
        (ROOT / "docs" / "licenses.md").write_text(licenses(), encoding="utf-8")
    else:
        folder = Path(sys.argv[2])
        bom = sbom()
        name = f"heretic-{bom['metadata']['component']['version']}.cdx.json"
        (folder / name).write_text(json.dumps(bom, indent=1) + "\n", encoding="utf-8")
