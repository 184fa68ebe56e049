"""Plot of a study's trials in the terminal: the first two objectives, with the Pareto front marked.

Drawn without a plotting library: those for terminals use one global figure and print it themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

from heretic.search.pareto import LABELS, Result, pareto_front

MARKS = {"other": ("·", "dim"), "front": ("●", "bold cyan"), "best": ("◆", "bold green")}
PLAIN_MARKS = {"other": ".", "front": "o", "best": "#"}  # for terminals that know ASCII only
SMALLEST_KL = 1e-4
EDGE = 8  # columns left of the plot, for the refusal counts


def draw(results: Sequence[Result], best: Result | None, width: int, height: int, *, ascii_only: bool = False) -> Text:
    """Draw at most `height` lines of at most `width` columns: the second objective upward, the first to the right.

    Omits destroyed models (infinite KL). Returns an empty text without results or room.
    """
    shown = [r for r in results if all(map(math.isfinite, r.drawn))]
    columns, rows = width - EDGE - 1, height - 2
    if not shown or columns < 16 or rows < 3:
        return Text()
    x_label, y_label = shown[0].axes
    logarithmic = x_label == LABELS["kl"]
    kls = [math.log10(max(r.drawn[0], SMALLEST_KL)) if logarithmic else r.drawn[0] for r in shown]
    counts = [r.drawn[1] for r in shown]
    low, high = _range(kls, 1 if logarithmic else 0)
    least, most = _range(counts, 1 if y_label == LABELS["refusals"] else 0)
    marks = _kinds(shown, best)
    cells: dict[tuple[int, int], str] = {}
    for result, kl in zip(shown, kls, strict=True):
        column = round((kl - low) / (high - low) * (columns - 1))
        row = round((most - result.drawn[1]) / (most - least) * (rows - 1))
        kind = marks[result.number]
        before = cells.get((row, column), "other")
        cells[row, column] = max(kind, before, key=list(MARKS).index)
    text = Text(no_wrap=True)
    label = "refusals" if y_label == LABELS["refusals"] else y_label[:EDGE]
    numbers = {0: f"{most:.4g}", rows - 1: f"{least:.4g}"}
    side, corner, floor = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    for row in range(rows):
        text.append(f"{numbers.get(row, label if row == 1 else '')!s:>{EDGE}}{side}", style="dim")
        for column in range(columns):
            cell = cells.get((row, column))
            mark, style = MARKS[cell] if cell else (" ", "")
            text.append(PLAIN_MARKS[cell] if cell and ascii_only else mark, style)
        text.append("\n")
    text.append(f"{'':>{EDGE}}{corner}{floor * columns}\n", style="dim")
    first, last = (f"{10**end if logarithmic else end:.2g}" for end in (low, high))
    middle = f"{x_label:^{max(len(x_label), columns - len(first) - len(last))}}"
    text.append(f"{'':>{EDGE}} {first}{middle}{last}"[:width], style="dim")
    return text


def _kinds(shown: Sequence[Result], best: Result | None) -> dict[int, str]:
    kinds = dict.fromkeys((r.number for r in shown), "other")
    kinds.update(dict.fromkeys((r.number for r in pareto_front(shown)), "front"))
    if best is not None and best.number in kinds:
        kinds[best.number] = "best"
    return kinds


def _range(numbers: Sequence[float], least: float) -> tuple[float, float]:
    """Return the lowest and highest number, at least `least` apart."""
    low, high = min(numbers), max(numbers)
    return low, max(high, low + max(least, 1e-9, 1e-9 * abs(low)))
