"""Figures of residual geometry, for the report of a run and for `heretic geometry`."""

from __future__ import annotations

from collections.abc import Sequence

from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.report.figures import BLUE, GREEN, ORANGE, RED, Figure, layer_axis, short
from heretic.scoring.direction_effects import DirectionEffects

SECOND_AXIS = {"overlaying": "y", "side": "right", "showgrid": False, "tickmode": "auto", "rangemode": "tozero"}


def geometry_figures(geometry: ResidualGeometry) -> dict[str, Figure]:
    """Return figures by their name on the page, without the projections (one a layer)."""
    return {
        "separation": _separation(geometry),
        "norms": _norms(geometry),
        "cosines": _cosines(geometry),
    }


def effects_figure(effects: DirectionEffects) -> Figure:
    """Return refusal probabilities and KL by layer, with the direction removed or added."""
    data = [
        _line("removed", effects.necessity.tolist(), RED),
        _line("added", effects.sufficiency.tolist(), BLUE),
        {**_line("KL (right)", effects.kl.tolist(), ORANGE), "yaxis": "y2"},
    ]
    layout = {
        "xaxis": layer_axis(len(effects.kl)),
        "yaxis": {"title": {"text": "refusal probability"}, "rangemode": "tozero"},
        "yaxis2": {**SECOND_AXIS, "title": {"text": "KL"}},
        "showlegend": True,
    }
    return {"data": data, "layout": layout}


def projections(geometry: ResidualGeometry) -> list[tuple[str, Figure]]:
    """Return a label and a projection for every layer."""
    harmful = geometry.harmful.bool()
    labeled_figures = []
    for layer in range(geometry.num_layers):
        data = []
        for name, members, color, symbol in (
            ("harmless", ~harmful, BLUE, "circle"),
            ("harmful", harmful, RED, "diamond"),
        ):
            points = geometry.points[layer][members]
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": _short(points[:, 0].tolist()),
                    "y": _short(points[:, 1].tolist()),
                    "marker": {"color": color, "symbol": symbol, "size": 7, "opacity": 0.7},
                    "hovertemplate": f"{name} prompt %{{pointNumber}}<extra></extra>",
                }
            )
        first, second = geometry.explained[layer].tolist()
        silhouette = float(geometry.silhouette[layer])
        label = f"layer {layer} of 0 to {geometry.num_layers - 1}, silhouette {silhouette:.2f}"
        layout = {
            "xaxis": {"title": {"text": f"first component ({first:.0%} of the variance)"}},
            "yaxis": {"title": {"text": f"second component ({second:.0%})"}},
            "hovermode": "closest",
            "showlegend": True,
        }
        labeled_figures.append((label, {"data": data, "layout": layout}))
    return labeled_figures


def _separation(geometry: ResidualGeometry) -> Figure:
    data = [
        _line("silhouette", geometry.silhouette.tolist(), BLUE),
        {**_line("separation (right)", geometry.separation.tolist(), ORANGE), "yaxis": "y2"},
    ]
    layout = {
        "xaxis": layer_axis(geometry.num_layers),
        "yaxis": {"title": {"text": "silhouette"}},
        "yaxis2": {**SECOND_AXIS, "title": {"text": "separation"}},
        "showlegend": True,
    }
    return {"data": data, "layout": layout}


def _norms(geometry: ResidualGeometry) -> Figure:
    names = zip(("harmful mean", "harmless mean", "difference"), (RED, BLUE, ORANGE), strict=True)
    data = [_line(name, geometry.norms[:, i].tolist(), color) for i, (name, color) in enumerate(names)]
    axis = {"title": {"text": "norm"}, "type": "log", "exponentformat": "power"}
    return {"data": data, "layout": {"xaxis": layer_axis(geometry.num_layers), "yaxis": axis, "showlegend": True}}


def _cosines(geometry: ResidualGeometry) -> Figure:
    heat = {
        "type": "heatmap",
        "z": [_short(row) for row in geometry.cosines.tolist()],
        "zmin": -1,
        "zmax": 1,
        "colorscale": [[0, GREEN], [0.5, "#f4f4f2"], [1, BLUE]],
        "hovertemplate": "layers %{y} and %{x}: %{z:.3f}<extra></extra>",
        "colorbar": {"thickness": 12, "title": {"text": "cosine"}},
    }
    axis = {**layer_axis(geometry.num_layers), "constrain": "domain"}
    layout = {"xaxis": axis, "yaxis": {**axis, "scaleanchor": "x"}}
    return {"data": [heat], "layout": layout}


def _line(name: str, values: Sequence[float], color: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(range(len(values))),
        "y": _short(values),
        "line": {"color": color, "width": 2},
        "hovertemplate": f"{name}, layer %{{x}}: %{{y:.3f}}<extra></extra>",
    }


def _short(numbers: Sequence[float]) -> list[float | None]:
    return [short(n) for n in numbers]
