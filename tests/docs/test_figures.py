"""Figures that a benchmark's JSON holds stand in the documents as they are there.

What a page has to say of which result is in figures.toml. After a new measurement it is the page that is wrong, or its wording has
changed, and figures.toml with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.docs.pages import ROOT, prose

README, BENCHMARKS = "README.md", "benchmarks/README.md"
RESULTS = ROOT / "benchmarks/results"
TABLE = tomllib.loads((Path(__file__).parent / "figures.toml").read_text(encoding="utf-8"))
TOLD = [(page, result, told) for page, of in TABLE.items() for result, texts in of.items() for told in texts]
QUALITY = {p.name for p in RESULTS.glob("quality_*.json")}  # told in benchmarks/quality.md, which is made of them


def read(name: str) -> dict[str, Any]:
    """A result, and what the pages say of it in other words."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    if "seconds_total" in found:
        minutes, seconds = divmod(round(found["seconds_total"]), 60)
        found["minutes"] = f"{minutes} min {seconds} s"
    if "points" in found:
        told = [p["scores"] for p in found["points"]]
        found["points_by_gentleness"] = ", ".join(f"{s['refusals']} at {s['divergence']['mean']:.4f}" for s in told)
    if "searches" in found:
        fronts = {search["method"]: next(iter(search["fronts"].values())) for search in found["searches"]}
        found["hypervolumes"] = {method: front["hypervolume"] for method, front in fronts.items()}
    if name == "families.json":
        checks = ("attached = baked", "removed", "trials in a pass", "padding", "residuals", "decoding", "export")
        passing = sum(all(row.get(check) in ("yes", "-") for check in checks) for row in found.values())
        found = {"families": len(found), "passing": passing}
    return found


@pytest.mark.parametrize("page, result, told", TOLD, ids=lambda value: value if value.endswith(("md", "json")) else "")
def test_a_figure_is_the_measured_one(page: str, result: str, told: str) -> None:
    text = prose(ROOT / page).replace(" %", "%")
    said = told.format(**read(result))
    assert said in text, f"{page} does not say {said!r}, as {result} has it"


@pytest.mark.parametrize(
    "row, markers", [("refusals of 50 at KL, by our phrases", "our_markers"), ("the same by theirs", "their_markers")]
)
def test_points_beside_the_peer_are_measured_ones(row: str, markers: str) -> None:
    again = read("versus_heretic.json")["again"]
    cells = prose(ROOT / README).split(f"| {row}")[1].split("|")[1:3]
    for tool, cell in zip(("ours", "theirs"), cells, strict=True):
        measured = {f"{p[markers]['refusals']} at {p[markers]['kl']:.3f}" for p in again[tool]}
        told = {point.strip() for point in cell.split(",")}
        assert told and told <= measured, f"{tool}: {told - measured}"


def test_every_result_is_told() -> None:
    told = {result for _, result, _ in TOLD} | QUALITY
    assert told == {p.name for p in RESULTS.glob("*.json")}, "figures.toml says where each is told"
