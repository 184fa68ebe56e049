"""Documents that are made from the code are what the code says today."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from heretic.errors import UserError

ROOT = Path(__file__).parents[2]

# Files in src/heretic that still have errors without a code of their own.
CODES_TO_COME = {
    "ablation/bake.py",
    "ablation/directions.py",
    "export/control_vector.py",
    "export/difference.py",
    "export/export.py",
    "export/gguf_file.py",
    "export/gguf_tokenizer.py",
    "export/lora.py",
    "export/manifest.py",
    "export/save.py",
    "export/upload.py",
    "export/verify.py",
    "model/anatomy.py",
    "model/decoding.py",
    "report/report.py",
    "scoring/benchmark.py",
    "scoring/classifier.py",
    "scoring/llm.py",
    "search/shelf.py",
    "search/storage.py",
    "search/turns.py",
}


def test_made_documents_are_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["documents"]()
    for name, text in made.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "make it anew: python scripts/make_docs.py"


def test_every_error_has_a_code() -> None:
    sites = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["sites"]()
    assert len(sites) > 200, "they are found"
    bare = {site.file for site in sites if UserError.code in site.codes}
    assert bare <= CODES_TO_COME, "give it a code: UserError(..., code=...)"
    codes = {code for site in sites for code in site.codes}
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code in codes)


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
