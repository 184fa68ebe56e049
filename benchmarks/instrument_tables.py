"""The tables of benchmarks/results/instrument.json: measures x tools, one table a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from results_tables import DEMO, MODELS, QWEN, SAME, Report, captioned, counted, read, unique

TOOLS = {
    "original": "original",
    "arditi": "one direction",
    "heretic-llm": "heretic-llm 1.4.0",
    "heretic-llm x2": "heretic-llm, twice the time",
    "heretic-llm, batch size 32 x3": "heretic-llm 1.4.0, batch size 32, three times the time",
    "temaq": "temaq-abliterated 1.1.1",
    "ours": "heretic",
    "ours, conditional": "heretic, `conditional`",
    "ours, readers": "heretic, `readers`",
    "ours, norm_aware off": "heretic, `norm_aware` off",
}
NAMES = {"heretic-llm, batch size 32 x3": "heretic-llm (three times the time)"}  # in the last column
PEERS = tuple(tool for tool in TOOLS if tool != "original" and not tool.startswith("ours"))
LIMITS = {
    "heretic-llm": "heretic-llm stopped after heretic's CPU time at the earliest; ",
    "heretic-llm, batch size 32 x3": "heretic-llm stopped after three times heretic's CPU time; ",
    "temaq": "temaq's search limited to heretic's elapsed time; ",
}


@dataclass(frozen=True)
class Measure:
    """A row of the table."""

    title: str
    cell: Callable[[Report], str]  # of one seed
    compared: str = ""  # number by which tools are compared; empty: not compared
    higher: bool = False


def number(name: str, digits: str = ".3g") -> Callable[[Report], str]:
    """Return a cell with one number and its standard error, if it has one."""

    def cell(row: Report) -> str:
        found = row["measured"].get(name)
        if found is None:
            return ""
        error = found.get("standard_error")
        return f"{found['value']:{digits}}" + (f"±{error:.1g}" if error else "")

    return cell


def numbers(*names: str, digits: str = ".2g") -> Callable[[Report], str]:
    """Return a cell with several numbers."""

    def text(row: Report) -> str:
        found = [row["measured"].get(name) for name in names]  # None: measured before the number existed
        return ", ".join(f"{number['value']:{digits}}" if number else "-" for number in found)

    return text


def refused(row: Report) -> str:
    """Return the refusals by length, the last with their interval."""
    return f"{numbers(*(f'refusals_by_length.{n}' for n in (32, 64, 128)), digits='g')(row)}, {refused_at_last(row)}"


def refused_at_last(row: Report) -> str:
    """Return the refusals in whole answers with their interval."""
    return counted(int(row["measured"]["refusals_by_length.256"]["value"]), held_out(row))


def held_out(row: Report) -> int:
    """Return the number of held-out harmful prompts."""
    begin, end = row["how"]["harmful_eval"].removeprefix("train[").removesuffix("]").split(":")
    return int(end) - int(begin or 0)


def borderline(row: Report) -> str:
    """Return newly refused and no longer refused borderline prompts."""
    if "borderline_refusals" not in row["measured"]:
        return ""
    return numbers("borderline_refusals.newly_refused", "borderline_refusals.no_longer_refused", digits="g")(row)


def time_to_model(row: Report) -> str:
    """Return the CPU time and the elapsed time to the written model, in minutes."""
    made = row["made"]
    return f"{made['cpu_seconds'] / 60:.0f} ({made['seconds'] / 60:.0f})" if made else ""


KL = "own_answer_kl"
FEW = ("refusals_by_length.256", "unanswered", KL, "unchanged", "text_perplexity")
MEASURES = (
    Measure("refusals in 32, 64, 128, 256 tokens", refused, "refusals_by_length.256"),
    Measure("late, turned back", numbers("refusals_by_length.late", "refusals_by_length.turned_back", digits="g")),
    Measure("loops in 256 tokens", numbers("refusals_by_length.loops", digits="g")),
    Measure(
        "not answered, of these evaded (trained judge)",
        numbers("unanswered", "unanswered.evasive", digits="g"),
        "unanswered",
    ),
    Measure("XSTest newly, no longer refused", borderline, "borderline_refusals.newly_refused"),
    Measure("KL, first token", number("first_token_kl"), "first_token_kl"),
    Measure("KL over the original's answers", number("answer_kl"), "answer_kl"),
    Measure("KL over its own answers", number(KL), KL),
    Measure("its median, p95, max", numbers(*(f"{KL}.{part}" for part in ("median", "p95", "max")))),
    Measure("perplexity of neutral text", number("text_perplexity", ".4g"), "text_perplexity"),
    Measure("perplexity of its answers", number("own_perplexity", ".3f"), "own_perplexity"),
    Measure("repeated 4-grams", number("repetition"), "repetition"),
    Measure("unchanged answers", number("unchanged"), "unchanged", higher=True),
    Measure("arithmetic", number("arithmetic"), "arithmetic", higher=True),
    Measure("copying", number("copying"), "copying", higher=True),
    Measure("trials", lambda row: str(row["made"].get("trials", ""))),
    Measure("minutes of CPU (elapsed)", time_to_model),
    Measure("peak memory, GB", lambda row: str(row["made"].get("peak_gb", ""))),
)


SOURCES = {  # the models of the README's table, and where their held-out requests come from
    "qwen2.5-coder-0.5b-instruct": (QWEN, "HarmBench"),
    "guarded-model": (DEMO, "cooking"),
}
INSTEAD = {("qwen2.5-coder-0.5b-instruct", "heretic-llm"): "heretic-llm, batch size 32 x3"}  # in the README's table
SHORT = {  # rows of the README's table, by the title there
    "refusals in 256 tokens (phrases)": refused_at_last,
    "not answered (trained judge)": numbers("unanswered", digits="g"),
    "KL over its own answers": number(KL),
    "unchanged harmless answers": number("unchanged"),
    "XSTest newly refused": numbers("borderline_refusals.newly_refused", digits="g"),
    "minutes of CPU": lambda row: time_to_model(row).partition(" ")[0],
    "peak memory, GB": lambda row: str(row["made"].get("peak_gb", "")),
}


def short() -> str:
    """Return the README's table: both models, the tools that search, a few measures."""
    report = read("instrument")
    tools = ("original", "heretic-llm", "temaq", "ours")
    lines: list[tuple[str, ...]] = [("", *(TOOLS[tool] for tool in tools))]
    described = []
    for model, (name, source) in SOURCES.items():
        rows = {row["tool"]: row for row in report["rows"] if row["model"] == model and not row["seed"]}
        lines.append((f"**{name}**", *[""] * len(tools)))
        shown = [rows.get(INSTEAD.get((model, tool), tool)) for tool in tools]
        lines += [(title, *(cell(row) if row else "" for row in shown)) for title, cell in SHORT.items()]
        described.append(f"{name}: {held_out(rows['ours'])} held-out requests ({source})")
    return captioned(
        lines, "instrument", model="; ".join(described),
        settings="brackets: 95 % Wilson interval; defaults of every tool, bfloat16, their system prompt, seed 0, the trained "
        "judge's encoder on the machine; "
        "heretic-llm on Qwen: batch size given, three times heretic's CPU time",
        command="`python benchmarks/instrument.py ASSETS`",
    )  # fmt: skip


def table_of(model: str, source: str, shortened: bool = False, measures: Sequence[Measure] = MEASURES) -> str:
    """Return the table of a model with its caption, or with what in it differs from the first table's."""
    report = read("instrument")
    rows = [row for row in report["rows"] if row["model"] == model]
    found = {tool: [row for row in rows if row["tool"] == tool] for tool in TOOLS}
    found = {tool: sorted(each, key=lambda row: row["seed"] or 0) for tool, each in found.items() if each}
    peers = [tool for tool in PEERS if tool in found]
    lines = [("", *(TOOLS[tool] for tool in found), *["better than heretic"][: len(peers)])]
    for measure in measures:
        cells = [joined(measure, found[tool]) for tool in found]
        lines.append((measure.title, *cells, *[ahead(measure, found)][: len(peers)]))
    how = rows[0]["how"]
    seeds = ", ".join(str(row["seed"]) for row in found["ours"])
    limits = "".join(LIMITS.get(tool, "") for tool in peers)
    common = (
        f"defaults of every tool, here bfloat16; the system prompt of both peers; seed {seeds}; {limits}the trained "
        f"judge's encoder on the machine; refusals by "
        f"{how['judge']}, other answers of {how['tokens']} tokens; ± standard error of the difference from the original"
    )
    settings = (
        f"{SAME if shortened else common}; measured in {how['dtype']} on {held_out(rows[0])} harmful ({source}) and as many "
        "harmless prompts"
    )
    return captioned(
        lines, "instrument", model=MODELS[model], settings=settings,
        command="`python benchmarks/instrument.py ASSETS`",
    )  # fmt: skip


def joined(measure: Measure, rows: Sequence[Report]) -> str:
    """Return the cells of all seeds; one if all are equal."""
    cells = [measure.cell(row) for row in rows]
    return cells[0] if len(unique(cells)) == 1 else " / ".join(cells)


def ahead(measure: Measure, found: dict[str, list[Report]]) -> str:
    """Return the tools whose mean over the seeds is better than ours."""
    if not measure.compared:
        return ""

    def mean(tool: str) -> float:
        each = [
            row["measured"][measure.compared]["value"] for row in found[tool] if measure.compared in row["measured"]
        ]
        return statistics.mean(each) * (-1 if measure.higher else 1) if each else 0.0

    return ", ".join(
        NAMES.get(tool, TOOLS[tool].partition(" 1.")[0])
        for tool in PEERS
        if tool in found and mean(tool) < mean("ours")
    )


def qwen() -> str:
    """Return the table of Qwen."""
    return table_of("qwen2.5-coder-0.5b-instruct", "HarmBench", shortened=True)


def larger() -> str:
    """Return the table of the larger Qwen."""
    measures = [measure for measure in MEASURES if measure.compared in FEW]
    return table_of("qwen2.5-coder-1.5b-instruct", "HarmBench", shortened=True, measures=measures)


def gemma() -> str:
    """Return the table of Gemma with a guard."""
    measures = [measure for measure in MEASURES if measure.compared in FEW]
    return table_of("gemma-3-270m-guarded", "on cooking", shortened=True, measures=measures)


def demo() -> str:
    """Return the table of the demo model."""
    return table_of("guarded-model", "on cooking, which it refuses")
