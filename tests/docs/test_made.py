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


def test_the_calculation_for_large_models_is_what_its_script_says() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "scale.py"))["document"]()
    assert (ROOT / "benchmarks/scale.md").read_text(encoding="utf-8") == made


def test_the_table_of_sizes_is_what_the_planner_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = runpy.run_path(str(ROOT / "benchmarks" / "sizes.py"))["document"]()
    assert (ROOT / "benchmarks/sizes.md").read_text(encoding="utf-8") == made, (
        "make it anew: python benchmarks/sizes.py > benchmarks/sizes.md"
    )


def test_the_tables_of_quality_are_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = runpy.run_path(str(ROOT / "benchmarks" / "quality_page.py"))["document"]()
    assert (ROOT / "benchmarks/quality.md").read_text(encoding="utf-8") == made, (
        "make it anew: python benchmarks/quality_page.py > benchmarks/quality.md"
    )
