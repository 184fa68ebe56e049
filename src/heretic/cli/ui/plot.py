"""Plot of a study's trials in the terminal: refusals over KL divergence, with the Pareto front marked.

Drawn without a plotting library: those for terminals use one global figure and print it themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

from heretic.search.pareto import Result, pareto_front

MARKS = {"other": ("·", "dim"), "front": ("●", "bold cyan"), "best": ("◆", "bold green")}
PLAIN_MARKS = {"other": ".", "front": "o", "best": "#"}  # for terminals that know ASCII only
SMALLEST_KL = 1e-4
EDGE = 8  # columns left of the plot, for the refusal counts


def draw(results: Sequence[Result], best: Result | None, width: int, height: int, *, ascii_only: bool = False) -> Text:
    """Draw at most `height` lines of at most `width` columns: refusals upward, KL to the right on a logarithmic axis.

    Omits destroyed models (infinite KL). Returns an empty text without results or room.
    """
    shown = [r for r in results if math.isfinite(r.point[0])]
    columns, rows = width - EDGE - 1, height - 2
    if not shown or columns < 16 or rows < 3:
        return Text()
    kls = [_log(r) for r in shown]
    low, high = min(kls), max(max(kls), min(kls) + 1)
    counts = [r.point[1] for r in shown]
    least, most = min(counts), max(max(counts), min(counts) + 1)
    marks = _kinds(shown, best)
    cells: dict[tuple[int, int], str] = {}
    for result, kl in zip(shown, kls, strict=True):
        column = round((kl - low) / (high - low) * (columns - 1))
        row = round((most - result.point[1]) / (most - least) * (rows - 1))
        kind = marks[result.number]
        before = cells.get((row, column), "other")
        cells[row, column] = max(kind, before, key=list(MARKS).index)
    text = Text(no_wrap=True)
    numbers = {0: f"{most:g}", rows - 1: f"{least:g}"}
    side, corner, floor = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    for row in range(rows):
        text.append(f"{numbers.get(row, 'refusals' if row == 1 else '')!s:>{EDGE}}{side}", style="dim")
        for column in range(columns):
            cell = cells.get((row, column))
            mark, style = MARKS[cell] if cell else (" ", "")
            text.append(PLAIN_MARKS[cell] if cell and ascii_only else mark, style)
        text.append("\n")
    text.append(f"{'':>{EDGE}}{corner}{floor * columns}\n", style="dim")
    first, last = f"{10**low:.2g}", f"{10**high:.2g}"
    middle = f"{'KL divergence':^{max(13, columns - len(first) - len(last))}}"
    text.append(f"{'':>{EDGE}} {first}{middle}{last}"[:width], style="dim")
    return text


def _kinds(shown: Sequence[Result], best: Result | None) -> dict[int, str]:
    kinds = dict.fromkeys((r.number for r in shown), "other")
    kinds.update(dict.fromkeys((r.number for r in pareto_front(shown)), "front"))
    if best is not None and best.number in kinds:
        kinds[best.number] = "best"
    return kinds


def _log(result: Result) -> float:
    return math.log10(max(result.point[0], SMALLEST_KL))
