"""The wheel: everything that the program reads at run time is in it. `make dist` installs it too."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_code_data_and_license(tmp_path: Path) -> None:
    pytest.importorskip("build")

    source = tmp_path / "source"  # building leaves folders beside the sources
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if not n.endswith("/")}
        entry = next(archive.read(n).decode() for n in inside if n.endswith("entry_points.txt"))
    wanted = {
        p.relative_to(ROOT / "src").as_posix()
        for p in (ROOT / "src" / "heretic").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert not wanted - inside, f"not in the wheel: {sorted(wanted - inside)}"
    assert any(n.endswith("LICENSE") for n in inside) and "heretic = heretic.cli.main:main" in entry
    assert not [n for n in inside if n.startswith("tests/")]
