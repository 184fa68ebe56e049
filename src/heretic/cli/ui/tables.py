"""Tables of results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heretic.cli.ui.console import escape_terminal
from heretic.search.pareto import Result, pareto_front, table_columns
from heretic.search.space import describe

if TYPE_CHECKING:
    from heretic.ablation.residual_geometry import ResidualGeometry
    from heretic.pipeline.benchmark import Benchmark


FITTING: dict[str, Any] = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}  # into 80 columns


def show_front(console: Console, found: list[Result], before: int | None, chosen: int | None = None) -> None:
    """The Pareto front, fewest refusals first; the chosen trial is marked."""
    console.print(front_table(found, before, chosen))


def front_table(found: list[Result], before: int | None, chosen: int | None = None) -> Table | Text:
    """As `show_front` prints it."""
    best = pareto_front(found)
    if not best:
        beyond = sum(not r.scores.within_limits for r in found)
        return Text(f"{beyond} trials go beyond a limit of [constraints]." if beyond else "No trial is finished yet.")
    judge = best[0].scores.judge
    by = "" if judge == "markers" else f", judged by {judge}"
    table = Table(title=f"Front of {len(found)} trials measured in full{by}", title_justify="left", **FITTING)
    shown = table_columns(best)
    for heading in (*shown, "from"):
        table.add_column(heading, justify="left" if heading == "from" else "right")
    for r, *cells in zip(best, *shown.values(), strict=True):
        mark = " ←" if r.number == chosen else ""
        table.add_row(*cells, describe(r.params) + mark, style="bold" if mark else "")
    if before is not None:
        known = {"trial": "original", "refusals": f"{before}/{best[0].scores.total}"}
        known |= dict.fromkeys(("KL mean", "median", "p95", "max"), "0")
        table.add_row(*(known.get(heading, "") for heading in shown), "", style="dim")
    return table


def show_lines(console: Console, rows: list[tuple[str, str]]) -> None:
    """Names and values, aligned."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{escape_terminal(name):<{width}}  {escape_terminal(value)}", highlight=False, soft_wrap=True)


def show_geometry(console: Console, found: ResidualGeometry) -> None:
    """How residuals lie, a line a layer; the layer with the clearest clusters stands out."""
    harmful = int(found.harmful.sum())
    title = (
        f"Residuals after each block; clusters of {harmful} harmful and {len(found.harmful) - harmful} harmless prompts"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "cosine", "harmful", "harmless", "difference", "silhouette", "separation"):
        table.add_column(heading, justify="right")
    clearest = int(found.silhouette.argmax())
    for layer, cosine in enumerate(found.next_cosines):
        row = [str(layer), "" if cosine is None else f"{cosine:.3f}"]
        row += [f"{norm:.4g}" for norm in found.norms[layer].tolist()]
        row += [f"{float(found.silhouette[layer]):.3f}", f"{float(found.separation[layer]):.2f}"]
        table.add_row(*row, style="bold" if layer == clearest else "")
    console.print(table)
    console.print(
        "cosine: of a layer's direction with the next one's; harmful, harmless, difference: norms of the means."
    )


def show_benchmark(console: Console, found: Benchmark) -> None:
    """Every metric of every task before and after, with standard errors."""
    table = Table(title=f"Trial {found.trial} beside the original", title_justify="left")
    for heading in ("task", "metric", "questions", "original", "ablated", "difference"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for row in found.rows:
        table.add_row(
            escape_terminal(row.task),
            escape_terminal(row.metric) + ("" if row.higher_is_better else " (less is better)"),
            str(row.questions),
            _with_error(row.original, row.original_error),
            _with_error(row.ablated, row.ablated_error),
            _with_error(row.difference, row.difference_error, sign="+"),
        )
    console.print(table)
    console.print(f"Kept in {escape_terminal(str(found.file))}", highlight=False, soft_wrap=True)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")
