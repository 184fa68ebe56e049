"""CLAUDE.md's map has a line for every file of the package."""

from __future__ import annotations

from tests.docs.pages import ROOT


def test_the_map_names_every_module() -> None:
    text = (ROOT / "CLAUDE.md").read_text(encoding="utf-8")
    package = ROOT / "src/heretic"
    missing = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        folder = name.partition("/")[0] + "/"
        if path.name in ("__init__.py", "__main__.py") or folder in ("commands/", "settings/", "demo/"):
            continue  # named as a whole
        if f"`{name}`" not in text:
            missing.append(name)
    assert not missing, f"CLAUDE.md does not name: {', '.join(missing)}"
