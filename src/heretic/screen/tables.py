"""Tables of results."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from heretic.screen.console import printable
from heretic.search.front import Result, front
from heretic.search.space import describe


def show_front(console: Console, found: list[Result], before: int | None, chosen: int | None = None) -> None:
    """The Pareto front, fewest refusals first; the chosen trial is marked."""
    best = front(found)
    if not best:
        console.print("No trial is finished yet.")
        return
    total = best[0].scores.total
    table = Table(title=f"Front of {len(found)} trials measured in full", title_justify="left")
    for heading in ("trial", "refusals", "KL mean", "median", "p95", "max", "from"):
        table.add_column(heading, justify="left" if heading == "from" else "right")
    for r in best:
        d = r.scores.divergence
        mark = " ←" if r.number == chosen else ""
        row = [
            str(r.number),
            f"{r.scores.refusals}/{total}",
            f"{d.mean:.4f}",
            f"{d.median:.4f}",
            f"{d.p95:.4f}",
            f"{d.max:.4f}",
        ]
        table.add_row(*row, describe(r.params) + mark, style="bold" if mark else "")
    if before is not None:
        table.add_row("original", f"{before}/{total}", "0", "0", "0", "0", "", style="dim")
    console.print(table)


def show_lines(console: Console, rows: list[tuple[str, str]]) -> None:
    """Names and values, aligned."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{printable(name):<{width}}  {printable(value)}", highlight=False, soft_wrap=True)
