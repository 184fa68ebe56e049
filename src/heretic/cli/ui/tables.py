"""Tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heretic.cli.ui.console import escape_terminal
from heretic.scoring.comparison import Comparison, number_text, values_text
from heretic.search.pareto import Result, pareto_front, table_columns, value_heading
from heretic.search.space import describe

if TYPE_CHECKING:
    from heretic.ablation.residual_geometry import ResidualGeometry
    from heretic.pipeline.benchmark import Benchmark
    from heretic.scoring.direction_effects import DirectionEffects


COMPACT: dict[str, Any] = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}  # fits 80 columns


def show_pareto_front(
    console: Console,
    results: list[Result],
    original_refusals: int | None,
    selected: int | None = None,
    original_values: Mapping[str, float] | None = None,
) -> None:
    """Print the Pareto front, fewest refusals first; marks the selected trial."""
    console.print(pareto_table(results, original_refusals, selected, original_values))


def pareto_table(
    results: list[Result],
    original_refusals: int | None,
    selected: int | None = None,
    original_values: Mapping[str, float] | None = None,
) -> Table | Text:
    """Return the table that `show_pareto_front` prints, or a sentence if the front is empty."""
    best = pareto_front(results)
    if not best:
        beyond = sum(not r.scores.within_limits for r in results)
        return Text(f"{beyond} trials exceed a limit of [constraints]." if beyond else "No trial is finished yet.")
    judge = best[0].scores.judge
    by = "" if judge == "markers" else f", judged by {judge}"
    title = f"Pareto front of {len(results)} fully measured trials{by}"
    table = Table(title=title, title_justify="left", **COMPACT)
    shown = table_columns(best)
    for heading in (*shown, "from"):
        table.add_column(heading, justify="left" if heading == "from" else "right")
    for r, *cells in zip(best, *shown.values(), strict=True):
        mark = " ←" if r.number == selected else ""
        table.add_row(*cells, describe(r.params) + mark, style="bold" if mark else "")
    if original_refusals is not None:
        original = {"trial": "original", "refusals": f"{original_refusals}/{best[0].scores.total}"}
        original |= {value_heading(name): text for name, text in values_text(original_values or {}).items()}
        original |= dict.fromkeys(("KL mean", "median", "p95", "max"), "0")
        table.add_row(*(original.get(heading, "") for heading in shown), "", style="dim")
    return table


def show_lines(console: Console, rows: list[tuple[str, str]]) -> None:
    """Print names and aligned values."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{escape_terminal(name):<{width}}  {escape_terminal(value)}", highlight=False, soft_wrap=True)


def show_geometry(console: Console, geometry: ResidualGeometry, effects: DirectionEffects | None = None) -> None:
    """Print the residual geometry, a line per layer; the layer with the highest silhouette is bold.

    With `effects` the table has what each layer's direction does, and a line names the best one.
    """
    n_harmful = int(geometry.harmful.sum())
    n_harmless = len(geometry.harmful) - n_harmful
    title = f"Residuals after each block; clusters of {n_harmful} harmful and {n_harmless} harmless prompts"
    table = Table(title=title, title_justify="left")
    headings = ["layer", "cosine", "harmful", "harmless", "difference", "silhouette", "separation"]
    for heading in (*headings, *(("removed", "added", "KL") if effects else ())):
        table.add_column(heading, justify="right")
    clearest = int(geometry.silhouette.argmax())
    for layer, cosine in enumerate(geometry.next_cosines):
        row = [str(layer), "" if cosine is None else f"{cosine:.3f}"]
        row += [f"{norm:.4g}" for norm in geometry.norms[layer].tolist()]
        row += [f"{float(geometry.silhouette[layer]):.3f}", f"{float(geometry.separation[layer]):.2f}"]
        if effects:
            row += [f"{float(values[layer]):.3f}" for values in (effects.necessity, effects.sufficiency, effects.kl)]
        table.add_row(*row, style="bold" if layer == clearest else "")
    console.print(table)
    console.print(
        "cosine: between a layer's direction and the next layer's; harmful, harmless, difference: norms of the means."
    )
    if effects:
        before = [f"{number:.3f}" for number in effects.original.tolist()]
        best = "No layer's direction" if effects.best is None else f"The direction of layer {effects.best} best"
        console.print(
            f"removed: refusal probability of refused prompts without the direction ({before[0]} with it); added: of harmless "
            f"prompts with it ({before[1]} without); KL: on harmless prompts without it."
        )
        console.print(f"{best} meets the criteria of Arditi et al. 2024 for carrying refusal.")


def show_comparisons(console: Console, comparisons: Sequence[Comparison]) -> None:
    """Print the numbers of scorers for the original and the ablated model."""
    table = Table(**COMPACT)
    for heading in ("measure", "unit", "original", "ablated", "difference", "better"):
        table.add_column(heading, justify="right" if heading in ("original", "ablated", "difference") else "left")
    for c in comparisons:
        numbers = number_text(c.original, c.total), number_text(c.ablated, c.total), c.difference_text
        table.add_row(escape_terminal(c.name), escape_terminal(c.unit), *numbers, c.better)
    console.print(table)


def show_benchmark(console: Console, result: Benchmark) -> None:
    """Print every metric of every task for the original and the trial, with standard errors."""
    table = Table(title=f"Trial {result.trial} and the original", title_justify="left")
    for heading in ("task", "metric", "questions", "original", "ablated", "difference"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for row in result.rows:
        table.add_row(
            escape_terminal(row.task),
            escape_terminal(row.metric) + ("" if row.higher_is_better else " (lower is better)"),
            str(row.questions),
            _with_error(row.original, row.original_error),
            _with_error(row.ablated, row.ablated_error),
            _with_error(row.difference, row.difference_error, sign="+"),
        )
    console.print(table)
    console.print(f"Written: {escape_terminal(str(result.file))}", highlight=False, soft_wrap=True)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")
