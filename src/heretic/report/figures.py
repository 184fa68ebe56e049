"""Figures of a study as plotly data: dictionaries with `data` and `layout`.

The page sets colors, grid and text for dark or light mode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heretic.search.pareto import LABELS, Result, pareto_front
from heretic.search.pruning import StudyHistory
from heretic.search.space import describe

Figure = dict[str, Any]

BLUE, ORANGE, GREEN, RED, GRAY = "#3b82c4", "#e08a1e", "#2a9d6f", "#d1495b", "#8a8f98"
COMPONENT_COLORS = (BLUE, ORANGE, GREEN, RED)
SMALLEST_KL = 1e-6  # smaller values are drawn there
BINS = 30


def of_front(progress: StudyHistory, chosen: int | None, before: int | None) -> Figure:
    """Plot every trial by KL and refusals, except destroyed models (infinite KL)."""
    best = pareto_front(progress.results)
    on_front = {r.number for r in best}
    others = [r for r in progress.results if r.number not in on_front and all(map(math.isfinite, r.drawn))]
    data = []
    pruned = [trial for trial in progress.pruned if math.isfinite(trial.kl)]
    if pruned:
        data.append(
            {
                **_dots(
                    "pruned (dominated): refusals estimated", [(t.kl, t.refusals) for t in pruned], logarithmic=True
                ),
                "text": [f"trial {t.number}" for t in pruned],
                "marker": {"symbol": "circle-open", "size": 7, "color": GRAY},
                "hovertemplate": "%{text}: pruned, about %{y:.1f} expected refusals<br>KL %{x:.4f}<extra></extra>",
            }
        )
    if others:
        data.append({**_results("measured", others), "marker": {"size": 7, "color": BLUE, "opacity": 0.55}})
    if best:
        line = {"shape": "hv", "color": ORANGE, "width": 2}
        marked = {"size": 9, "color": ORANGE}
        data.append({**_results("Pareto front", best[::-1]), "mode": "lines+markers", "line": line, "marker": marked})
    selected = [r for r in best if r.number == chosen]
    if selected:
        star = {"symbol": "star", "size": 17, "color": RED, "line": {"width": 1, "color": "white"}}
        data.append({**_results("chosen", selected), "marker": star})
    x, y = progress.results[0].axes if progress.results else (LABELS["kl"], LABELS["refusals"])
    logarithmic = {"title": {"text": f"{x} (nats)"}, "type": "log", "exponentformat": "power"}
    layout: Figure = {
        "xaxis": logarithmic if x == LABELS["kl"] else {"title": {"text": x}},
        "yaxis": {"title": {"text": y}, "rangemode": "tozero"},
        "hovermode": "closest",
    }
    if before is not None and y == LABELS["refusals"]:
        layout["shapes"] = [_horizontal_line(before)]
        layout["annotations"] = [
            {"text": f"original: {before}", "x": 1, "xref": "paper", "xanchor": "right", "y": before, "yanchor": "bottom",
             "showarrow": False}
        ]  # fmt: skip
    return {"data": data, "layout": layout}


def of_progress(numbers: Sequence[int], hypervolume: Sequence[float]) -> Figure:
    """Plot the hypervolume after every finished trial."""
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": list(numbers),
        "y": [short(v) for v in hypervolume],
        "line": {"shape": "hv", "color": BLUE, "width": 2},
        "fill": "tozeroy",
        "fillcolor": "rgba(59, 130, 196, 0.15)",
        "hovertemplate": "trial %{x}: %{y:.4f}<extra></extra>",
    }
    axes = {"xaxis": {"title": {"text": "trial"}}, "yaxis": {"title": {"text": "hypervolume"}, "rangemode": "tozero"}}
    return {"data": [line], "layout": axes}


def of_strengths(strengths: Mapping[str, Sequence[float]]) -> Figure:
    """Plot strengths over the layers, by component."""
    data = [
        {
            "type": "bar",
            "name": component,
            "x": list(range(len(profile))),
            "y": [short(s) for s in profile],
            "marker": {"color": COMPONENT_COLORS[i % len(COMPONENT_COLORS)]},
            "hovertemplate": f"{component}, layer %{{x}}: %{{y:.3f}}<extra></extra>",
        }
        for i, (component, profile) in enumerate(strengths.items())
    ]
    count = len(next(iter(strengths.values()), ()))
    axes = {"xaxis": layer_axis(count), "yaxis": {"title": {"text": "strength"}, "rangemode": "tozero"}}
    return {"data": data, "layout": {**axes, "barmode": "group", "bargap": 0.2, "showlegend": True}}


def of_divergences(per_prompt: Sequence[float], marks: Mapping[str, float]) -> Figure:
    """Plot a histogram of log KL per prompt, with `marks` as lines."""
    logs = np.log10(np.maximum(np.asarray(per_prompt), SMALLEST_KL))
    counts, edges = np.histogram(logs, bins=BINS, range=(math.floor(logs.min()), math.ceil(logs.max() + 1e-9)))
    spans = [f"{10**a:.2g} to {10**b:.2g}" for a, b in itertools.pairwise(edges)]
    bars = {
        "type": "bar",
        "x": [short(x) for x in (edges[:-1] + edges[1:]) / 2],
        "y": counts.tolist(),
        "text": spans,
        "textposition": "none",
        "marker": {"color": BLUE},
        "hovertemplate": "KL %{text}: %{y} prompts<extra></extra>",
    }
    lines = []
    for (name, value), color in zip(marks.items(), (RED, ORANGE, GREEN, GRAY), strict=False):
        position = math.log10(max(value, SMALLEST_KL))
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{name} {value:.4f}",
                "x": [position, position],
                "y": [0, int(counts.max())],
                "line": {"color": color, "width": 2, "dash": "dash"},
                "hovertemplate": f"{name}: {value:.4f}<extra></extra>",
            }
        )
    decades = range(math.floor(edges[0]), math.ceil(edges[-1]) + 1)
    ticks = {"tickvals": list(decades), "ticktext": [f"{10.0**d:g}" for d in decades]}
    layout = {
        "xaxis": {"title": {"text": "KL of a prompt (nats)"}, **ticks},
        "yaxis": {"title": {"text": "prompts"}},
        "bargap": 0.05,
        "showlegend": True,
    }
    return {"data": [{**bars, "showlegend": False}, *lines], "layout": layout}


def of_requests(rows: Sequence[tuple[str, str]], before: str) -> Figure:
    """Plot the verdict of every request by trial.

    Args:
        rows: Names, and a digit for each request: 0 answered, 1 refused, 2 neither.
        before: The original's digits.
    """

    def code(i: int, kind: str) -> int:
        return {"0": 0, "2": 3}.get(kind, 1 if i >= len(before) or before[i] == "1" else 2)

    codes = [[code(i, kind) for i, kind in enumerate(kinds)] for _, kinds in rows]
    words = ("answered", "refused", "refused, but the original answers", "neither refused nor answered")
    colors = ("rgba(138, 143, 152, 0.18)", ORANGE, RED, BLUE)
    steps = [[(i + end) / len(colors), color] for i, color in enumerate(colors) for end in (0, 1)]
    heat = {
        "type": "heatmap",
        "z": codes,
        "x": list(range(1, len(codes[0]) + 1)),
        "y": [name for name, _ in rows],
        "zmin": -0.5,
        "zmax": 3.5,
        "colorscale": steps,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "text": [[words[code] for code in row] for row in codes],
        "hovertemplate": "%{y}, request %{x}: %{text}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "request"}},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
    }
    return {"data": [heat], "layout": layout}


def of_importances(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plot the importance of every parameter, grouped by goal."""
    order = list(next(iter(importances.values())))[::-1]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": goal,
            "y": order,
            "x": [short(shares.get(name, 0.0)) for name in order],
            "marker": {"color": color},
            "hovertemplate": "%{y}: %{x:.0%} (" + goal + ")<extra></extra>",
        }
        for (goal, shares), color in zip(importances.items(), COMPONENT_COLORS, strict=False)
    ][::-1]  # plotly stacks from below
    axes = {"xaxis": {"tickformat": ".0%", "rangemode": "tozero"}, "yaxis": {"automargin": True}}
    return {
        "data": data,
        "layout": {**axes, "barmode": "group", "showlegend": True, "legend": {"traceorder": "reversed"}},
    }


def of_phases(seconds: Mapping[str, float]) -> Figure:
    """Plot seconds by phase, the longest on top."""
    order = sorted(seconds, key=lambda name: seconds[name])
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [name if len(name) < 60 else f"{name[:57]}…" for name in map(escaped, order)],
        "x": [short(seconds[name]) for name in order],
        "marker": {"color": BLUE},
        "hovertemplate": "%{y}: %{x:.1f} s<extra></extra>",
    }
    axes = {"xaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"}, "yaxis": {"automargin": True}}
    return {"data": [bars], "layout": axes}


def layer_axis(layers: int) -> Figure:
    """Return an axis of `layers` layers with about a dozen ticks."""
    return {"title": {"text": "layer"}, "dtick": max(1, math.ceil(layers / 12))}


def escaped(text: str) -> str:
    """Escape text for plotly, which parses markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _dots(name: str, points: Sequence[tuple[float, float]], *, logarithmic: bool) -> Figure:
    x = [short(max(value, SMALLEST_KL) if logarithmic else value) for value, _ in points]
    y = [short(value) for _, value in points]
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "cliponaxis": False}


def _results(name: str, results: Sequence[Result]) -> Figure:
    x, y = results[0].axes
    place = "%{y} expected<br>KL %{x:.4f}" if (x, y) == tuple(LABELS.values()) else f"{y} %{{y}}<br>{x} %{{x:.4g}}"
    return {
        **_dots(name, [r.drawn for r in results], logarithmic=x == LABELS["kl"]),
        "text": [f"trial {r.number}, {describe(r.params)}: {r.scores.refusals} refusals" for r in results],
        "customdata": [r.number for r in results],
        "hovertemplate": f"%{{text}}, {place}, measured<extra></extra>",
    }


def _horizontal_line(height: float) -> Figure:
    line = {"color": GRAY, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}


def short(number: float) -> float | None:
    """Round to four digits; None for what is not finite, also not after rounding."""
    rounded = float(f"{float(number):.4g}")
    return rounded if math.isfinite(rounded) else None
