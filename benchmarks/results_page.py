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

import results_tables as tables
import scale
import sizes

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results:\2 -->)", re.S)
CALCULATED = "Calculated, not measured. RTX 4090 for 24 GiB, A100 for 80 GiB, by their data sheets."


def calculated_sizes() -> str:
    """Return what fits where, and the hours of a study."""
    text = (
        f"{CALCULATED} `python benchmarks/results_page.py sizes`. Settings: the "
        "defaults, 200 trials, prompts of up to 600 characters. Cells: batch size in "
        "bfloat16, else with the most bits that fit (`quantization`). "
        "Hours: from the floor of the data sheet to half of its speed, without download and export."
    )
    return f"{tables.table(sizes.rows())}\n\n{tables.wrapped(text)}"


def calculated_scale() -> str:
    """Return what a study of a 32B model costs."""
    text = (
        f"{CALCULATED} {scale.LARGE.name}, bfloat16. `python benchmarks/results_page.py scale`. Settings: the defaults, all rows "
        "in one batch, no row or trial ends early, loading at 2 GB/s. Ranges: from the floor to half of its speed. Sources: "
        f"{'; '.join(device.source for device in scale.DEVICES)}."
    )
    return f"{tables.table(scale.rows())}\n\n{tables.wrapped(text)}"


BLOCKS: dict[str, Callable[[], str]] = {
    "held_out": tables.held_out,
    "held_out_demo": tables.held_out_demo,
    "answers": tables.answers,
    "methods": tables.methods,
    "versus": tables.versus,
    "study": tables.study,
    "convergence": tables.convergence,
    "savings": tables.savings,
    "residuals": tables.residuals,
    "busy": tables.busy,
    "host_waits": tables.host_waits,
    "llama_cpp": tables.llama_cpp,
    "sizes": calculated_sizes,
    "scale": calculated_scale,
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
