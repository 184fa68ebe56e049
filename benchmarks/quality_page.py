"""Makes benchmarks/quality.md: the tables of every results/quality_*.json, which `quality.py` wrote.

    python benchmarks/quality_page.py > benchmarks/quality.md

Nothing is measured here. A file's first method is what its others are compared with.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from heretic.scoring.interval import wilson

RESULTS = Path(__file__).parent / "results"
MAX_KLS = ("0.05", "0.1", "0.2")
Report = Mapping[str, Any]
Point = Mapping[str, Any]


def document() -> str:
    """The page."""
    reports = {
        path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("quality_*.json"))
    }
    newest_first = sorted(reports.items(), key=lambda item: item[1]["date"], reverse=True)
    return "\n\n".join([INTRODUCTION, *("\n\n".join(section(name, report)) for name, report in newest_first)]) + "\n"


def section(name: str, report: Report) -> Iterator[str]:
    """What one file holds."""
    yield f"## {name.removesuffix('.json')}"
    machine = report["machine"]
    yield (
        f"`results/{name}`, {report['date'][:10]}, {report['model']}, {machine['cpu']}, PyTorch "
        f"{report['versions']['torch']}; the original declines {report['declined_before']} of {report['of']}."
    )
    yield f"    {report['command']}"
    if note := report.get("note"):
        yield note
    yield from filter(None, (compared(report), fronts(report), picked(report)))


def compared(report: Report) -> str:
    """Methods by their hypervolumes, each seed beside the first method's, at the last mark."""
    found: dict[str, dict[int, float]] = {}
    for search in report["searches"]:
        found.setdefault(search["method"], {})[search["seed"]] = last(search)["hypervolume"]
    if len(found) < 2:
        return ""
    first = next(iter(found))
    rows = []
    for method, by_seed in found.items():
        apart = [f"{value - found[first][seed]:+.4f}" for seed, value in by_seed.items() if seed in found[first]]
        rows.append((method, *spread_of(by_seed), ", ".join(apart) if method != first else ""))
    return table(("method", "seeds", "hypervolume, mean", "least to most", f"seed by seed beside {first}"), rows)


def spread_of(by_seed: Mapping[int, float]) -> tuple[str, str, str]:
    """The seeds, their mean, and how far apart they are."""
    values = list(by_seed.values())
    between = f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""
    return " ".join(map(str, by_seed)), f"{statistics.mean(values):.4f}", between


def fronts(report: Report) -> str:
    """Every front: the fewest refusals up to some KL, its points, its hypervolume."""
    rows = []
    for search in report["searches"]:
        for found in search["fronts"].values():
            head = (search["method"], search["seed"], found["trials"], f"{found['seconds']:.0f} s")
            rows.append((*head, *of_front(report, found["points"], found)))
    for group, found in (report.get("groups") or {}).items():
        points = [m for m in report["models"] if m["group"] == group]
        name = Path(group).name
        rows.append((f"folders of {name}", "", "", "", *of_front(report, points, found)))
    limits = [f"at KL ≤ {kl}" for kl in MAX_KLS]
    return table(
        ("method", "seed", "trials", "search", *limits, "points: refusals at KL (over 8 tokens)", "hypervolume"), rows
    )


def of_front(report: Report, points: Sequence[Point], found: Mapping[str, Any]) -> list[str]:
    """Cells of one front."""
    fewest = [counted(found[f"refusals_at_{kl}"], report["of"]) for kl in MAX_KLS]
    told = sorted(undominated(points), key=lambda p: -p["kl"])
    spelled = ", ".join(f"{p['refusals']} at {p['kl']:.3f}{further(p)}" for p in told)
    return [*fewest, spelled, f"{found['hypervolume']:.4f}"]


def picked(report: Report) -> str:
    """What the chosen models say besides: the points of fewest refusals at a KL of at most 0.1 on what the study saw."""
    rows = []
    for search in report["searches"]:
        for point in last(search)["points"]:
            if "answers" in point:
                rows.append((search["method"], search["seed"], *of_point(report, point)))
    for model in report.get("models") or []:
        if "answers" in model:
            rows.append((Path(model["group"]).name, model["folder"], *of_point(report, model)))
    columns = ("refused", "KL mean", "median", "p95", "max", "harmless refused", "tokens", "loops", "perplexity")
    return table(("method or folder", "seed or model", *columns), rows) if rows else ""


def of_point(report: Report, point: Point) -> list[str]:
    """Cells of one point; a pair is of answers to harmful and to harmless prompts."""
    said = point["answers"]
    kls = [f"{point[key]:.3f}" for key in ("kl", "kl_median", "kl_p95", "kl_max")]
    pairs = [f"{said['harmful'][key]} / {said['harmless'][key]}" for key in ("tokens", "loops", "perplexity")]
    return [counted(point["refusals"], report["of"]), *kls, str(said["over_refusals"]), *pairs]


def counted(count: int | None, total: int) -> str:
    """A count, and the 95 % interval of its share in per cent."""
    if count is None:
        return ""
    low, high = wilson(count, total)
    return f"{count} [{100 * low:.0f}-{100 * high:.0f} %]"


def further(point: Point) -> str:
    """The divergence over more tokens, where it was measured."""
    return next((f" ({value:.3f})" for key, value in point.items() if key.startswith("kl_over_")), "")


def undominated(points: Sequence[Point]) -> list[Point]:
    """The front of these points."""
    return [p for p in points if not any(beats(q, p) for q in points)]


def beats(one: Point, other: Point) -> bool:
    """In both values, and in one of them truly."""
    a, b = (one["refusals"], one["kl"]), (other["refusals"], other["kl"])
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def last(search: Mapping[str, Any]) -> dict[str, Any]:
    """The front at the last mark."""
    found: dict[str, Any] = list(search["fronts"].values())[-1]
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


INTRODUCTION = """# Fronts on prompts that no study saw

Made by `python benchmarks/quality_page.py` from the results of `quality.py`, newest first; what to read in them is told in
[README.md](README.md). Every model is measured on harmful and harmless prompts that neither the directions, nor the walk, nor the
trials saw: ours in memory with the operators attached, as trials are, and the folders of other tools loaded from disk. (That what
is attached scores what the written model scores is tested, and every export is measured again: docs/how.md.)

- In brackets behind a count: the 95 % interval (Wilson) of the share of declined requests; behind a KL: that over the first 8
  tokens of the original's answers.
- Hypervolume: the share of KL up to 0.5 and refusals up to the original's that the points dominate.
- Every search has `max_response_length = 32` (default 100), `search.n_startup_trials = 10` (default 30), float32, 100 + 100 prompts
  for the directions, and what its command sets; all other settings are the defaults.
- The folders of heretic-llm 1.4.0 were made with float32, 32 tokens (default 100), 10 random trials at the start (default 60),
  and the number of trials of their file (default 200); all other settings are its defaults.
- "Search": its time, the walk included, measurements on these prompts left out. It compares only within a file.
- The methods are those of `METHODS` in quality.py: `free` is the default, `mixture` and `per_layer` other directions of the walk,
  `kernels` the search without a walk.
- The last table of a file tells how the chosen models answer: tokens of an answer (64 at most), answers that are more than half
  repetition, and their perplexity under the original; of answers to harmful / to harmless requests."""


if __name__ == "__main__":
    print(document(), end="")
