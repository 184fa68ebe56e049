"""Documents that are made from the code are what the code says today."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_made_documents_are_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["documents"]()
    for name, text in made.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "make it anew: python scripts/make_docs.py"


def test_tables_of_results_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = runpy.run_path(str(ROOT / "benchmarks/results_page.py"))
    for path in page["pages"]():
        text = path.read_text(encoding="utf-8")
        assert page["fill"](text) == text, f"{path}: make it anew: python benchmarks/results_page.py"
