"""Figures of a study, as plotly's own data: each a dictionary with `data` and `layout`, which plotly.js draws.

Colors, grid and text are given by the page, which knows whether it is shown dark or light.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heretic.search.pareto import Result, pareto_front
from heretic.search.pruning import StudyHistory
from heretic.search.space import describe

Figure = dict[str, Any]

BLUE, ORANGE, GREEN, RED, GRAY = "#3b82c4", "#e08a1e", "#2a9d6f", "#d1495b", "#8a8f98"
COMPONENT_COLORS = (BLUE, ORANGE, GREEN, RED)
SMALLEST_KL = 1e-6  # what is less is drawn there
BINS = 30


def of_front(progress: StudyHistory, chosen: int | None, before: int | None) -> Figure:
    """Every trial in the plane of KL and refusals; a destroyed model (infinite KL) has no place in it."""
    best = pareto_front(progress.results)
    on_front = {r.number for r in best}
    others = [r for r in progress.results if r.number not in on_front and math.isfinite(r.point[0])]
    data = []
    left = [trial for trial in progress.pruned if math.isfinite(trial.kl)]
    if left:
        data.append(
            {
                **_dots("left early: refusals estimated", [t.kl for t in left], [t.refusals for t in left]),
                "text": [f"trial {t.number}" for t in left],
                "marker": {"symbol": "circle-open", "size": 7, "color": GRAY},
                "hovertemplate": "%{text}: left early, about %{y:.1f} expected refusals<br>KL %{x:.4f}<extra></extra>",
            }
        )
    if others:
        data.append({**_results("measured", others), "marker": {"size": 7, "color": BLUE, "opacity": 0.55}})
    if best:
        line = {"shape": "hv", "color": ORANGE, "width": 2}
        marked = {"size": 9, "color": ORANGE}
        data.append({**_results("front", best[::-1]), "mode": "lines+markers", "line": line, "marker": marked})
    picked = [r for r in best if r.number == chosen]
    if picked:
        star = {"symbol": "star", "size": 17, "color": RED, "line": {"width": 1, "color": "white"}}
        data.append({**_results("chosen", picked), "marker": star})
    layout: Figure = {
        "xaxis": {"title": {"text": "KL divergence (nats)"}, "type": "log", "exponentformat": "power"},
        "yaxis": {"title": {"text": "expected refusals"}, "rangemode": "tozero"},
        "hovermode": "closest",
    }
    if before is not None:
        layout["shapes"] = [_across(before)]
        layout["annotations"] = [
            {"text": f"original: {before}", "x": 1, "xref": "paper", "xanchor": "right", "y": before, "yanchor": "bottom",
             "showarrow": False}
        ]  # fmt: skip
    return {"data": data, "layout": layout}


def of_progress(numbers: Sequence[int], hypervolume: Sequence[float]) -> Figure:
    """The hypervolume after every trial measured in full."""
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": list(numbers),
        "y": [_short(v) for v in hypervolume],
        "line": {"shape": "hv", "color": BLUE, "width": 2},
        "fill": "tozeroy",
        "fillcolor": "rgba(59, 130, 196, 0.15)",
        "hovertemplate": "trial %{x}: %{y:.4f}<extra></extra>",
    }
    axes = {"xaxis": {"title": {"text": "trial"}}, "yaxis": {"title": {"text": "hypervolume"}, "rangemode": "tozero"}}
    return {"data": [line], "layout": axes}


def of_strengths(strengths: Mapping[str, Sequence[float]]) -> Figure:
    """Strengths over the layers, by component."""
    data = [
        {
            "type": "bar",
            "name": component,
            "x": list(range(len(profile))),
            "y": [_short(s) for s in profile],
            "marker": {"color": COMPONENT_COLORS[i % len(COMPONENT_COLORS)]},
            "hovertemplate": f"{component}, layer %{{x}}: %{{y:.3f}}<extra></extra>",
        }
        for i, (component, profile) in enumerate(strengths.items())
    ]
    count = len(next(iter(strengths.values()), ()))
    axes = {"xaxis": layer_axis(count), "yaxis": {"title": {"text": "strength"}, "rangemode": "tozero"}}
    return {"data": data, "layout": {**axes, "barmode": "group", "bargap": 0.2, "showlegend": True}}


def of_divergences(per_prompt: Sequence[float], marks: Mapping[str, float]) -> Figure:
    """How many prompts have which KL, in equal steps of its logarithm; `marks` are drawn as lines."""
    logs = np.log10(np.maximum(np.asarray(per_prompt), SMALLEST_KL))
    counts, edges = np.histogram(logs, bins=BINS, range=(math.floor(logs.min()), math.ceil(logs.max() + 1e-9)))
    spans = [f"{10**a:.2g} to {10**b:.2g}" for a, b in itertools.pairwise(edges)]
    bars = {
        "type": "bar",
        "x": [_short(x) for x in (edges[:-1] + edges[1:]) / 2],
        "y": counts.tolist(),
        "text": spans,
        "textposition": "none",
        "marker": {"color": BLUE},
        "hovertemplate": "KL %{text}: %{y} prompts<extra></extra>",
    }
    lines = []
    for (name, value), color in zip(marks.items(), (RED, ORANGE, GREEN, GRAY), strict=False):
        place = math.log10(max(value, SMALLEST_KL))
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{name} {value:.4f}",
                "x": [place, place],
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
    """Requests by trials: answered, still declined, declined although the original answers, or neither. `rows` are names and what
    is stored of each request: 0 answered, 1 declined, 2 neither."""

    def code(i: int, kind: str) -> int:
        return {"0": 0, "2": 3}.get(kind, 1 if i >= len(before) or before[i] == "1" else 2)

    codes = [[code(i, kind) for i, kind in enumerate(kinds)] for _, kinds in rows]
    words = ("answered", "refused", "declined, but the original answers", "neither declined nor answered")
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
    """Shares of every parameter, one group of bars a parameter; `importances` by what they are important for."""
    order = list(next(iter(importances.values())))[::-1]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": goal,
            "y": order,
            "x": [_short(shares.get(name, 0.0)) for name in order],
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
    """Seconds by phase, the longest on top."""
    order = sorted(seconds, key=lambda name: seconds[name])
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [name if len(name) < 60 else f"{name[:57]}…" for name in map(escaped, order)],
        "x": [_short(seconds[name]) for name in order],
        "marker": {"color": BLUE},
        "hovertemplate": "%{y}: %{x:.1f} s<extra></extra>",
    }
    axes = {"xaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"}, "yaxis": {"automargin": True}}
    return {"data": [bars], "layout": axes}


def layer_axis(layers: int) -> Figure:
    """An axis of so many layers, with about a dozen whole numbers on it."""
    return {"title": {"text": "layer"}, "dtick": max(1, math.ceil(layers / 12))}


def escaped(text: str) -> str:
    """Text that plotly shows as it is: it takes angle brackets for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _dots(name: str, kl: Sequence[float], refusals: Sequence[float]) -> Figure:
    x = [_short(max(value, SMALLEST_KL)) for value in kl]
    y = [_short(r) for r in refusals]
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "cliponaxis": False}


def _results(name: str, found: Sequence[Result]) -> Figure:
    return {
        **_dots(name, [r.point[0] for r in found], [r.point[1] for r in found]),
        "text": [f"trial {r.number}, {describe(r.params)}: {r.scores.refusals} refusals" for r in found],
        "customdata": [r.number for r in found],
        "hovertemplate": "%{text}, %{y} expected<br>KL %{x:.4f}, measured<extra></extra>",
    }


def _across(height: float) -> Figure:
    line = {"color": GRAY, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}


def _short(number: float) -> float | None:
    """Four digits; what is no number is left out of a drawing."""
    return float(f"{float(number):.4g}") if math.isfinite(number) else None
