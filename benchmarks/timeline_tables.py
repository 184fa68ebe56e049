"""Tables of the simulation in benchmarks/results/timeline.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from results_tables import Report, read, table, wrapped

BITS = {"none": "", "bnb_8bit": " in 8 bits", "bnb_4bit": " in 4 bits"}
GRAPHS_WORTH = 0.1  # share of a study that is named


def simulated(rows: list[tuple[str, ...]], settings: str, part: str) -> str:
    """Return a table of a part of the report, and its caption, which says that nothing of it was measured."""
    made = read("timeline")["made"][part]
    text = f"Simulated, not measured. `{made['command']}`, {made['date'][:10]}. {settings} Data: `timeline.json`."
    return f"{table(rows)}\n\n{wrapped(text)}"


def sizes() -> str:
    """Return what fits where, and how long a study takes."""
    found: dict[str, dict[str, Report]] = {}
    for study in read("timeline")["studies"]:
        found.setdefault(study["size"], {})[study["cards"]] = study
    names = list(next(iter(found.values())))
    graphs = "; ".join(filter(None, (by_graphs(studies.values()) for studies in found.values())))
    a = read("timeline")["assumptions"]
    rows = [("model", *names), *((size, *(cell(studies[name]) for name in names)) for size, studies in found.items())]
    return simulated(
        rows,
        f"Assumed: {1e6 * a['launch']:.0f} us of the host a launch, {a['compute']:.0%} of the FLOP/s of NVIDIA's data sheets, "
        f"{a['memory']:.0%} of the memory's bandwidth, {a['links']:.0%} of a link's. Defaults, 200 trials, short prompts, every "
        "layer edited, no trial pruned, loading at 2 GB/s, without download and export; bfloat16 unless bits are given "
        "(`quantization`). In brackets: batch size and, of several cards, mean utilization during a trial. Launches while "
        f"decoding, the most that `decoding_graphs` could save: {graphs}.",
        "studies",
    )


def by_graphs(studies: Iterable[Report]) -> str:
    """Return for which machine with one card launches while decoding are the largest share of a study; empty if it is small."""
    waiting = [s for s in studies if "seconds" in s and s["cards"].startswith("1x")]
    most = max(waiting, key=lambda s: s["decoding_launches"] / s["seconds"], default=None)
    if most is None or most["decoding_launches"] < GRAPHS_WORTH * most["seconds"]:
        return ""
    return f"{most['decoding_launches']:.0f} of {most['seconds']:.0f} s ({most['size']}, {most['cards'][3:]})"


def cell(study: Report) -> str:
    """Describe a study; a model that fits on one card uses one."""
    if "seconds" not in study:
        return "no"
    used = study["trial"]["utilization"]
    busy = f", {sum(used) / len(used):.0%}" if len(used) > 1 else ""
    return f"{lasting(study['seconds'])}{BITS[study['quantization']]} ({study['batch']}{busy})"


def lasting(seconds: float) -> str:
    """Return minutes, or hours from two on."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def scale() -> str:
    """Return the ways to keep four cards busy with a 32B model."""
    report = read("timeline")["ways"]
    rows: list[tuple[str, ...]] = [
        ("way", "trials at once", "s a trial", "tokens/s", "utilization", "while decoding", "x one busy card")
    ]
    for trials, each in report["busy_card"].items():
        rows.append(("one busy card", trials, *numbers(each, report)))
    rows += [(row["kind"], str(row["trials"]), *numbers(row, report)) for row in report["rows"]]
    hosts = read("timeline")["host_times"]
    launches, in_turn = (
        ", ".join(f"{factor * each[key]:.{digits}f}" for each in hosts)
        for key, factor, digits in (("launch", 1e6, 0), ("in_turn", 1, 1))
    )
    studies = ", ".join(f"{name} {lasting(each['seconds'])}" for name, each in report["studies"].items())
    return simulated(
        rows,
        f"Assumed: as above. Qwen2.5-32B in bfloat16 on 4x RTX 4090, planned for {report['batch']} rows under way. "
        "Last column: tokens/s against one busy card with one trial, and with its best number of trials. "
        f"At {launches} us a launch, four trials in turn take {in_turn} s each. A study: {studies}.",
        "ways",
    )


def numbers(row: Report, report: Report) -> tuple[str, ...]:
    """Return seconds, tokens/s, utilizations and relative throughput."""
    one = report["busy_card"]["1"]["tokens_per_second"]
    best = max(each["tokens_per_second"] for each in report["busy_card"].values())
    rate = row["tokens_per_second"]
    return (
        f"{row['seconds']:.1f}", f"{rate:.0f}", f"{mean(row['utilization']):.0%}", f"{mean(row['decoding_utilization']):.0%}",
        f"{rate / one:.1f}, {rate / best:.1f}",
    )  # fmt: skip


def calibration() -> str:
    """Return the passes on the CPU: measured and predicted."""
    report = read("timeline")["calibration"]
    rows: list[tuple[str, ...]] = [("pass", "measured", "predicted", "error")]
    for name, found in report["passes"].items():
        both = (f"{1e3 * found[key]:.0f} ms" for key in ("measured", "predicted"))
        rows.append((name, *both, f"{found['error']:+.0%}"))
    machine = read("timeline")["machine"]
    text = (
        f"The same replay with one core of an {machine['cpu']} as the card, CPU seconds. {report['model']}, random weights, "
        f"float32, {report['rows']} rows of {report['tokens']} tokens; decoding after {report['cached']}. Measured rates: "
        f"{report['bandwidth'] / 1e9:.0f} GB/s, {1e6 * report['launch']:.0f} us a launch, matrix products. Data: `timeline.json`."
    )
    return f"{table(rows)}\n\n{wrapped(text)}"


def mean(values: Any) -> float:
    """Return the mean."""
    return float(sum(values) / len(values))
