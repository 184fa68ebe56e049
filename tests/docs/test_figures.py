"""Figures that a benchmark's JSON holds stand in the documents as they are there.

A line of `TOLD` is a page, a file of benchmarks/results, and what the page has to say, with `str.format` fields of the JSON. After a new
measurement it is the page that is wrong, or its wording has changed and the line here with it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.docs.pages import ROOT, prose

README, BENCHMARKS, LESSONS = "README.md", "benchmarks/README.md", "LESSONS_LEARNED.md"
RESULTS = ROOT / "benchmarks/results"

TOLD = [
    (README, "study.json", "| a trial measured in full | {seconds_per_trial[trial]:.0f} s,"),
    (README, "study.json", "30 trials ({left_early} left early), export, verification | {minutes} |"),
    (README, "study.json", "| peak memory | {peak_gb:.1f} GB |"),
    (README, "study.json", "{declined_before} of 50 before, {chosen[refusals]} after, at KL {chosen[kl]:.3f};"),
    (README, "versus_heretic.json", "| a fully measured trial | {ours[seconds_trial_measured_median]:.0f} s | {theirs[seconds_trial_median]:.0f} s |"),
    (README, "versus_heretic.json", "| to the end of the study | {ours[seconds_study]:.0f} s | {theirs[seconds_study]:.0f} s |"),
    (README, "versus_heretic.json", "by our phrases ({again[original][our_markers][refusals]} before)"),
    (README, "versus_heretic.json", "| the same by theirs ({again[original][their_markers][refusals]} before)"),
    (BENCHMARKS, "study.json", "| {seconds_per_trial[trial]:.1f} s: {seconds_per_trial[divergence]:.1f} s KL, {seconds_per_trial[refusals]:.1f} s refusals |"),
    (BENCHMARKS, "study.json", "30 trials, export, verification | {seconds_total:.0f} s |"),
    (BENCHMARKS, "study.json", "| trials left early | {left_early} |"),
    (BENCHMARKS, "study.json", "| peak memory of the process | {peak_gb:.1f} GB |"),
    (BENCHMARKS, "study_measured_in_full.json", "{seconds_per_trial[trial]:.1f} s: {seconds_per_trial[divergence]:.1f} s KL"),
    (BENCHMARKS, "study_measured_in_full.json", "s | {seconds_total:.0f} s |"),
    (BENCHMARKS, "passes.json", "| every prompt whole | 16 | {passes[0][prefill_s]:.1f} | {passes[0][decode_s]:.1f} |"),
    (BENCHMARKS, "passes.json", "| beginning once | 64 | {passes[3][prefill_s]:.1f} | {passes[3][decode_s]:.1f} |"),
    (BENCHMARKS, "trial.json", "every saving on | {ways[one trial in a pass][seconds_per_trial]:.1f} |"),
    (BENCHMARKS, "trial.json", "| four trials in a pass | {ways[four trials in a pass][seconds_per_trial]:.1f} |"),
    (BENCHMARKS, "trial.json", "none of the savings | {ways[one, none of it][seconds_per_trial]:.1f} |"),
    (BENCHMARKS, "residuals.json", "| a bare forward pass over the same batches | {prompts_per_second[bare forward pass]:.2f} | 1 |"),
    (BENCHMARKS, "residuals.json", "(what a study does) | {prompts_per_second[residuals, beginning run once]:.2f} |"),
    (BENCHMARKS, "versus_heretic.json", "| a fully measured trial, median | {ours[seconds_trial_measured_median]:.1f} s | {theirs[seconds_trial_median]:.1f} s:"),
    (BENCHMARKS, "versus_heretic.json", "hypervolume {comparison[our_markers][hypervolume][ours]:.3f} / {comparison[their_markers][hypervolume][ours]:.3f} |"),
    (BENCHMARKS, "walk.json", "| free direction | {points_by_gentleness} |"),
    ("benchmarks/scale_out.md", "scale_out.json", "| 8 | {rows[3][trials_per_hour]:.0f} | {rows[3][efficiency]:.0%} |"),
    (LESSONS, "scale_out.json", "| {rows[3][efficiency]:.0%} of what eight could do, with simulated trials; four {rows[2][efficiency]:.0%} |"),
    (LESSONS, "trial.json", "| {ways[four trials in a pass][seconds_per_trial]:.2f} s a trial instead of {ways[two trials in a pass][seconds_per_trial]:.2f}:"),
    (LESSONS, "residuals.json", "| {prompts_per_second[residuals, beginning run once]:.0f} prompts a second |"),
    (LESSONS, "quality_free_per_layer.json", "hypervolume {hypervolumes[per_layer]:.4f}, against {hypervolumes[free]:.4f} with a free one"),
    (LESSONS, "quality_mixture_kernels.json", "{hypervolumes[kernels]:.4f}, against {hypervolumes[mixture]:.4f} with a walk"),
    (LESSONS, "quality_directions.json", "{hypervolumes[geometric_median]:.4f}, against {hypervolumes[free]:.4f}: nothing"),
    (LESSONS, "quality_directions.json", "| three contrastive components a layer | {hypervolumes[contrastive_3]:.4f} |"),
    (LESSONS, "quality_directions.json", "| {hypervolumes[map_3]:.4f}; better at the gentle point"),
    (LESSONS, "quality_directions.json", "| {hypervolumes[rounds_1]:.4f}, which hangs on one request"),
    ("docs/architectures.md", "families.json", "{families} were tried; {passing} pass everything"),
]  # fmt: skip
QUALITY = sorted(p.name for p in RESULTS.glob("quality_*.json") if p.name != "quality_directions.json")


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


@pytest.mark.parametrize("name", QUALITY)
def test_the_table_of_methods_is_the_measured_one(name: str) -> None:
    """A row for every search: what it took, and its front on the held-out prompts."""
    text = prose(ROOT / BENCHMARKS)
    for search in read(name)["searches"]:
        found = next(iter(search["fronts"].values()))
        front = [p for p in found["points"] if not any(beats(q, p) for q in found["points"])]
        points = ", ".join(f"{p['refusals']} at {p['kl']:.3f}" for p in sorted(front, key=lambda p: -p["kl"]))
        row = f"| {search['method']} | {search['seed']} | {found['seconds']:.0f} s | {found['trials']} | {points} |"
        assert f"{row} {found['hypervolume']:.4f} |" in text, row


def beats(one: dict[str, float], other: dict[str, float]) -> bool:
    """In both values, and in one of them truly."""
    a, b = (one["refusals"], one["kl"]), (other["refusals"], other["kl"])
    return a != b and a[0] <= b[0] and a[1] <= b[1]


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
    told = {result for _, result, _ in TOLD} | set(QUALITY)
    assert told == {p.name for p in RESULTS.glob("*.json")}, "a line in TOLD says where each is told"
