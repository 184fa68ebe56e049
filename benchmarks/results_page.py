"""Fill the blocks `<!-- results:NAME -->` of the documents with tables made from benchmarks/results/*.json.

    python benchmarks/results_page.py             # fill every document
    python benchmarks/results_page.py sizes       # print one block

Nothing is measured here. A test compares every block with what this script makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import instrument_tables
import results_tables as tables
import timeline_tables

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results:\2 -->)", re.S)

BLOCKS: dict[str, Callable[[], str]] = {
    "instrument": instrument_tables.short,
    "instrument_qwen": instrument_tables.qwen,
    "instrument_demo": instrument_tables.demo,
    "instrument_larger": instrument_tables.larger,
    "instrument_gemma": instrument_tables.gemma,
    "held_out": tables.held_out,
    "methods": tables.methods,
    "geometries": tables.geometries,
    "versus": tables.versus,
    "convergence": tables.convergence,
    "savings": tables.savings,
    "plan_peaks": tables.plan_peaks,
    "llama_cpp": tables.llama_cpp,
    "sizes": timeline_tables.sizes,
    "scale": timeline_tables.scale,
    "calibration": timeline_tables.calibration,
}


def pages() -> list[Path]:
    """Return the documents that may hold blocks."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def fill(text: str) -> str:
    """Return a document with every block made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{made(block[2])}\n{block[3]}", text)


@cache
def made(name: str) -> str:
    """Return a block's table and caption. Raises SystemExit for an unknown name."""
    if name not in BLOCKS:
        sys.exit(f"No block of results is called {name}. There are {', '.join(BLOCKS)}.")
    return BLOCKS[name]()


def main() -> None:
    """Print the blocks that are named, or fill every document."""
    for name in sys.argv[1:]:
        print(made(name))
    for page in pages() if not sys.argv[1:] else ():
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            page.write_text(filled, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
