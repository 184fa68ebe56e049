"""Documents that are made from the code are what the code says today."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from heretic.errors import UserError

ROOT = Path(__file__).parents[2]


def test_made_documents_are_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["documents"]()
    for name, text in made.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "make it anew: python scripts/make_docs.py"


def test_every_error_has_a_code() -> None:
    sites = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["sites"]()
    assert len(sites) > 200, "they are found"
    bare = {site.file for site in sites if UserError.code in site.codes}
    assert not bare, "give it a code: UserError(..., code=...)"
    codes = {code for site in sites for code in site.codes}
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code in codes)


def test_tables_of_results_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = runpy.run_path(str(ROOT / "benchmarks/results_page.py"))
    for path in page["pages"]():
        text = path.read_text(encoding="utf-8")
        assert page["fill"](text) == text, f"{path}: make it anew: python benchmarks/results_page.py"
