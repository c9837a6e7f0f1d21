"""Charts as Plotly figures: plain dictionaries, drawn by the page when they come into view."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..charts.model import DIVERGING, GREY, INK, Chart, Panel, Series
from ..charts.names import shorten
from ..charts.scale import log_range, log_ticks, spread

WIDTH = 960  # the page's column, which the pixels below are shares of
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
TITLE, AXIS, RIGHT = 26, 46, 14  # pixels above a panel, below it, and to its right
TOP = 24  # pixels above all panels, for the buttons that appear there
LETTER = 6.6  # pixels of a letter in a tick label
GRID = "#E6E6E2"
BAND = 0.18  # opacity of a null's band


def figure(chart: Chart) -> dict:
    """``{"data", "layout"}`` for ``Plotly.newPlot``."""
    data: list[dict] = []
    layout: dict = {
        "height": height(chart),
        "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
        "font": {"family": FONT, "size": 12.5, "color": INK},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#FFFFFF", "bordercolor": "#888888", "font": {"color": INK}},
        "bargap": 0,
        "barmode": "overlay",
        "annotations": [],
        "shapes": [],
    }
    for index, panel in enumerate(chart.panels):
        add_panel(chart, index, panel, data, layout)
    return {"data": data, "layout": layout}


def height(chart: Chart) -> int:
    return TOP + sum(row_heights(chart))


def row_heights(chart: Chart) -> list[int]:
    """Pixels of each row of panels: slanted labels need room below."""
    rows = [chart.panels[i : i + chart.across] for i in range(0, len(chart.panels), chart.across)]
    return [chart.panel_height + max(below(chart, panel) - AXIS for panel in row if row) for row in rows]


def longest(labels: Sequence[str]) -> int:
    """Letters of the longest label as it is drawn."""
    return max(map(len, shorten(labels)))


def gutter(panel: Panel) -> float:
    """Pixels to the left of a panel, for tick labels and the title of its y axis."""
    labels = list(panel.heat.strips) if panel.heat else list(panel.ticks[1]) if panel.lying and panel.ticks else []
    if labels:
        return min(270.0, 14 + LETTER * longest(labels))
    return 72.0


def slanted(chart: Chart, panel: Panel) -> bool:
    """Whether labels below a panel are too long to stand side by side."""
    if panel.ticks is None or panel.lying:
        return False
    room = (WIDTH / chart.across - gutter(panel) - RIGHT) / max(1, len(panel.ticks[1]))
    return LETTER * longest(panel.ticks[1]) > room - 6


def below(chart: Chart, panel: Panel) -> int:
    if panel.heat:
        return AXIS - 6  # its ticks are smaller
    if not slanted(chart, panel):
        return AXIS if panel.x_title or not panel.ticks else 28
    assert panel.ticks is not None
    return int(22 + 0.68 * LETTER * longest(panel.ticks[1]))


def domain(chart: Chart, index: int) -> tuple[list[float], list[float]]:
    """Where a panel lies, as shares of the figure's width and height."""
    row, column = divmod(index, chart.across)
    heights = row_heights(chart)
    panel, cell, total = chart.panels[index], 1 / chart.across, height(chart)
    left = max(gutter(other) for other in chart.panels[column :: chart.across])
    x = [column * cell + left / WIDTH, (column + 1) * cell - RIGHT / WIDTH]
    top = TOP + sum(heights[:row])
    y = [1 - (top + heights[row] - below(chart, panel)) / total, 1 - (top + TITLE) / total]
    return [round(v, 5) for v in x], [round(v, 5) for v in y]


def add_panel(chart: Chart, index: int, panel: Panel, data: list[dict], layout: dict) -> None:
    number = "" if index == 0 else str(index + 1)
    x_axis, y_axis = f"x{number}", f"y{number}"
    x_domain, y_domain = domain(chart, index)
    layout[f"xaxis{number}"] = axis(panel.x_title, x_domain, y_axis, panel.log_x) | x_look(chart, panel)
    layout[f"yaxis{number}"] = axis(panel.y_title, y_domain, x_axis, panel.log_y) | y_look(panel)
    if panel.title:
        layout["annotations"].append(
            {
                "text": f"<b>{panel.title}</b>", "x": x_domain[0], "y": y_domain[1], "xref": "paper", "yref": "paper",
                "xanchor": "left", "yanchor": "bottom", "yshift": 3, "showarrow": False, "font": {"size": 13},
            }
        )  # fmt: skip
    if panel.floor:
        value, text = panel.floor
        layout["shapes"].append(
            {"type": "rect", "xref": f"{x_axis} domain", "x0": 0, "x1": 1, "yref": y_axis, "y0": value * 1e-6,
             "y1": value, "fillcolor": "#ECECE8", "line": {"width": 0}, "layer": "below"}
        )  # fmt: skip
        layout["annotations"].append(
            {"text": f"{text} {value:.2g}\N{DEGREE SIGN}", "xref": f"{x_axis} domain", "x": 0.01, "yref": y_axis,
             "y": round(math.log10(value), 5), "xanchor": "left", "yanchor": "top", "showarrow": False,
             "font": {"size": 11, "color": GREY}}
        )  # fmt: skip
    if panel.heat:
        data.append(heatmap(panel, x_axis, y_axis))
        if len(panel.boundaries):
            data.append(boundaries(panel, x_axis, y_axis))
    data.extend(trace(series, x_axis, y_axis) for series in panel.series)


def axis(title: str, place: list[float], anchor: str, log: bool) -> dict:
    return {
        "domain": place,
        "anchor": anchor,
        "type": "log" if log else "linear",
        "title": {"text": title, "standoff": 6},
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": "#9A9A9A",
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "#9A9A9A",
        "exponentformat": "power",
    }


def x_look(chart: Chart, panel: Panel) -> dict:
    if panel.heat:
        return {"showgrid": False, "ticks": "", "nticks": 6, "tickfont": {"size": 10.5}, "exponentformat": "none",
                "separatethousands": True}  # fmt: skip
    if panel.ticks and not panel.lying:
        places, labels = panel.ticks
        return {
            "tickvals": list(places),
            "ticktext": shorten(labels),
            "tickangle": -42 if slanted(chart, panel) else 0,
            "range": [-0.6, len(labels) - 0.4],
            "showgrid": False,
        }
    if panel.log_x:
        low, high = log_range([series.x for series in panel.series], 1.06)
        return log_look(low, high)
    layers = {x for series in panel.series for x in series.x if x is not None}
    return {"dtick": 1} if panel.x_title == "layer" and len(layers) < 12 else {}


def log_look(low: float, high: float) -> dict:
    values, labels = log_ticks(low, high)
    return {"range": [low, high], "tickvals": values, "ticktext": labels}


def y_look(panel: Panel) -> dict:
    if panel.heat:
        strips = panel.heat.strips
        return {"tickvals": list(range(len(strips))), "ticktext": shorten(strips), "ticks": "",
                "range": [len(strips) - 0.5, -0.5], "showgrid": False, "tickfont": {"size": 10.5}}  # fmt: skip
    if panel.lying and panel.ticks:
        places, labels = panel.ticks
        return {"tickvals": list(places), "ticktext": shorten(labels),
                "range": [-0.7, len(labels) - 0.3]}  # fmt: skip
    if panel.log_y:
        low, high = spread(panel)
        return log_look(low, high)
    if any(series.marks == "bars" for series in panel.series):
        return {"rangemode": "tozero"}
    return {}


def heatmap(panel: Panel, x_axis: str, y_axis: str) -> dict:
    heat = panel.heat
    assert heat is not None
    return {
        "type": "heatmap", "xaxis": x_axis, "yaxis": y_axis, "x": list(heat.edges), "z": heat.z,
        "zmin": 1 - heat.reach, "zmax": 1 + heat.reach, "colorscale": [list(stop) for stop in DIVERGING],
        "showscale": False, "ygap": 1.5,
        "hovertemplate": f"{panel.title}<br>%{{y}}, around %{{x:.0f}}: %{{z:.3f}} of the matrix's density"
        "<extra></extra>",
    }  # fmt: skip


def boundaries(panel: Panel, x_axis: str, y_axis: str) -> dict:
    """One trace of vertical lines, broken between them."""
    assert panel.heat is not None
    x = np.repeat(np.array(panel.boundaries, dtype=float), 3).tolist()
    x[2::3] = [None] * len(panel.boundaries)
    y = [-0.5, len(panel.heat.strips) - 0.5, None] * len(panel.boundaries)
    return {"type": "scatter", "mode": "lines", "xaxis": x_axis, "yaxis": y_axis, "x": x, "y": y,
            "line": {"color": "#111111", "width": 0.8}, "hoverinfo": "skip"}  # fmt: skip


def trace(series: Series, x_axis: str, y_axis: str) -> dict:
    if series.marks == "band":
        return band(series, x_axis, y_axis)
    found: dict = {"type": "scatter", "name": series.name, "xaxis": x_axis, "yaxis": y_axis, "x": list(series.x),
                   "y": list(series.y), "legendgroup": series.key}  # fmt: skip
    if isinstance(series.hover, str):
        found["hovertemplate"] = f"{series.hover}<extra></extra>"
    elif len(series.hover):
        found |= {"text": list(series.hover), "hovertemplate": "%{text}<extra></extra>"}
    if series.marks == "bars":
        found |= {"type": "bar", "width": series.width * 0.92, "marker": {"color": series.colour}}
        found["textposition"] = "none"
    elif series.marks == "line":
        found |= {"mode": "lines", "line": {"color": series.colour, "width": series.width, "dash": series.dash}}
        if sum(value is not None for value in series.y) == 1:
            found |= {"mode": "markers", "marker": {"color": series.colour, "size": 7}}
    elif series.marks == "ticks":
        found |= {"mode": "markers", "marker": {"symbol": "line-ew-open", "size": series.width, "color": series.colour,
                                                "line": {"width": 2.2, "color": series.colour}}}  # fmt: skip
    else:
        found |= {"mode": "markers", "marker": {"symbol": series.symbol, "size": 9, "color": series.colour,
                                                "line": {"width": 1.8, "color": series.colour}}}  # fmt: skip
    return found


def band(series: Series, x_axis: str, y_axis: str) -> dict:
    """One outline, there along the bottom and back along the top, filled."""
    red, green, blue = (int(series.colour[i : i + 2], 16) for i in (1, 3, 5))
    return {
        "type": "scatter", "mode": "lines", "name": series.name, "legendgroup": series.key, "xaxis": x_axis,
        "yaxis": y_axis, "x": [*series.x, *reversed(series.x)], "y": [*series.y, *reversed(series.top)],
        "fill": "toself", "fillcolor": f"rgba({red},{green},{blue},{BAND})", "line": {"width": 0}, "hoverinfo": "skip",
    }  # fmt: skip
