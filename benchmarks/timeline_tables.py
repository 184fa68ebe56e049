"""Tables of the simulation in benchmarks/results/timeline.json."""

from __future__ import annotations

from typing import Any

from results_tables import Report, read, table, wrapped

BITS = {"none": "", "bnb_8bit": " in 8 bits", "bnb_4bit": " in 4 bits"}


def simulated(rows: list[tuple[str, ...]], settings: str, part: str) -> str:
    """Return a table of a part of the report, and its caption, which says that nothing of it was measured."""
    report = read("timeline")
    a, made = report["assumptions"], report["made"][part]
    text = (
        f"Simulated, not measured: heretic's launches, replayed with data-sheet rates. `{made['command']}`, "
        f"{made['date'][:10]}. Assumed: {1e6 * a['launch']:.0f} us of the host a launch, {a['compute']:.0%} of the FLOP/s, "
        f"{a['memory']:.0%} of the memory's bandwidth, {a['links']:.0%} of a link's. {settings} Data: `timeline.json`."
    )
    return f"{table(rows)}\n\n{wrapped(text)}"


def sizes() -> str:
    """Return what fits where, and how long a study takes."""
    found: dict[str, dict[str, Report]] = {}
    for study in read("timeline")["studies"]:
        found.setdefault(study["size"], {})[study["cards"]] = study
    names = list(next(iter(found.values())))
    rows = [("model", *names), *((size, *(cell(studies[name]) for name in names)) for size, studies in found.items())]
    return simulated(
        rows,
        "Defaults, 200 trials, short prompts, every layer edited, no trial pruned, loading at 2 GB/s, without download and "
        "export. Cells: a study, in brackets the batch size and, in several cards, their mean utilization during a "
        "trial. bfloat16 unless bits are given (`quantization`). NVIDIA's data sheets give the rates, which are in the JSON. "
        "Several cards take no turns here but for 32B on 4x RTX 4090.",
        "studies",
    )


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
        rows.append(("one busy card with the whole model", trials, *numbers(each, report)))
    rows += [(row["kind"], str(row["trials"]), *numbers(row, report)) for row in report["rows"]]
    hosts = ", ".join(
        f"{1e6 * each['launch']:.0f} us: {each['one_batch']:.1f} and {each['in_turn']:.1f} s"
        for each in read("timeline")["host_times"]
    )
    studies = ", ".join(f"{name} {lasting(each['seconds'])}" for name, each in report["studies"].items())
    return simulated(
        rows,
        f"Qwen2.5-32B in bfloat16 on 4x RTX 4090, planned for {report['batch']} rows under way; 4 trials need `batch_size = 400`. "
        "Last column: tokens/s against one busy card with one trial, and with the number of trials that is best for it. A trial, "
        f"two in one batch and four in turn, by the host's time a launch: {hosts}. A study: {studies}.",
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
        f"The same replay with one CPU core as the card. {report['model']}, random weights, float32, {report['rows']} rows of "
        f"{report['tokens']} tokens; decoding after {report['cached']}. CPU seconds on an {machine['cpu']}. Measured rates: "
        f"{report['bandwidth'] / 1e9:.0f} GB/s, {1e6 * report['launch']:.0f} us a launch, products of matrices with the rows "
        "of the pass. Data: `timeline.json`."
    )
    return f"{table(rows)}\n\n{wrapped(text)}"


def mean(values: Any) -> float:
    """Return the mean."""
    return float(sum(values) / len(values))
