"""The charts of a report as PNG and PDF files, for papers: the same content, drawn by matplotlib."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ..checkpoint.write import atomic_write_bytes
from ..output import OutputError, dump
from .charts import Chart, Panel, Series, charts
from .charts.model import DIVERGING, GREY, INK, RUN_COLOURS
from .charts.names import shorten
from .charts.scale import log_range, log_ticks, spread
from .store import CAPTIONS, FIGURES
from .tables import Tables

WIDTH, DPI = 10.0, 160  # inches; dots per inch of PNG files
PIXELS = 96  # of the page, in an inch
BAND = 0.18  # opacity of a null's band
LETTER = 0.075  # inches of a letter of 9 points, on average
MARGIN = 0.95  # inches of a panel's width that its y axis and borders take
HANDLE = 0.55  # inches of a legend's entry beside its name
DASHES: dict = {"solid": "-", "dash": (0, (5, 3)), "dot": (0, (1, 2)), "dashdot": "-.", "longdash": (0, (9, 3))}
SYMBOLS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "circle-open": "o",
    "diamond-open": "D",
    "square-open": "s",
    "x-thin": "x",
}
STYLE: dict = {"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": "#9A9A9A", "axes.linewidth": 0.8,
        "pdf.fonttype": 42, "svg.hashsalt": "offprin"}  # fmt: skip


def write_figures(tables: Tables) -> list[Path]:
    """Draw every chart that the analysis has measurements for into ``figures/KEY.png`` and ``.pdf``.

    Their captions go into ``figures/captions.json``, by key, which also tells a later run that the files are ours.

    Raises OutputError where matplotlib is missing, OSError where a file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError:
        raise OutputError("figures are drawn by matplotlib; pip install 'offprin-kernels[report]'") from None
    folder = tables.root / FIGURES
    folder.mkdir(exist_ok=True)
    drawable = charts(tables)
    said = {chart.key: {"title": chart.title, "says": chart.says, "caption": chart.caption} for chart in drawable}
    atomic_write_bytes(folder / CAPTIONS, dump(said))
    written = []
    with rc_context(STYLE):
        for chart in drawable:
            drawn = draw(chart)
            FigureCanvasAgg(drawn)
            # placed once for both files
            drawn.draw_without_rendering()
            drawn.set_layout_engine("none")
            for kind in ("png", "pdf"):
                sink = io.BytesIO()
                # no date, so that equal input makes equal files
                metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
                drawn.savefig(sink, format=kind, dpi=DPI, metadata=metadata)
                path = folder / f"{chart.key}.{kind}"
                atomic_write_bytes(path, sink.getvalue())
                written.append(path)
    return written


def draw(chart: Chart):
    """A matplotlib figure; its title is the chart's, its message stays for the caption."""
    from matplotlib.figure import Figure

    down = -(-len(chart.panels) // chart.across)
    room = WIDTH / chart.across - MARGIN
    extra = max(below(panel, room) for panel in chart.panels)
    height = down * (chart.panel_height / PIXELS + extra) + 0.7
    if not chart.scale and len(chart.legend) > 1:
        height += 0.19 * -(-len(chart.legend) // legend_columns(list(chart.legend)))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(chart.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = figure.subplots(down, chart.across, squeeze=False).ravel()
    image = None
    for panel, axis in zip(chart.panels, axes, strict=False):
        image = draw_panel(panel, axis, room) or image
    for axis in axes[len(chart.panels) :]:
        axis.set_axis_off()
    if image is not None:
        bar = figure.colorbar(image, ax=list(axes), location="bottom", fraction=0.03, aspect=60, extend="both")
        bar.set_label(chart.scale)
    elif len(chart.legend) > 1:
        handles = [handle(name, looks) for name, looks in chart.legend.items()]
        columns = legend_columns(list(chart.legend))
        figure.legend(handles, list(chart.legend), loc="outside lower left", ncols=columns, frameon=False)
    return figure


def legend_columns(names: list[str]) -> int:
    """As many as the names leave room for."""
    return max(1, min(6, len(names), int(WIDTH / (HANDLE + LETTER * max(map(len, names))))))


def slanted(panel: Panel, room: float) -> bool:
    """Whether labels below a panel are too long to stand side by side in so many inches."""
    if panel.ticks is None or panel.lying:
        return False
    labels = shorten(panel.ticks[1])
    return LETTER * max(map(len, labels)) + 0.06 > room / len(labels)


def below(panel: Panel, room: float) -> float:
    """Inches that slanted labels take below a panel."""
    if not slanted(panel, room):
        return 0.0
    assert panel.ticks is not None
    return 0.1 + 0.65 * LETTER * max(map(len, shorten(panel.ticks[1])))


def draw_panel(panel: Panel, axis, room: float):
    """Draws into the axis; returns the image where the panel is one of strips."""
    axis.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
    axis.set_xlabel(panel.x_title)
    axis.set_ylabel(panel.y_title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    if panel.heat:
        return draw_strips(panel, axis)
    axis.grid(axis="x" if panel.lying else "both" if panel.ticks is None else "y", color="#E6E6E2", linewidth=0.7)
    for series in panel.series:
        draw_series(series, axis)
    if panel.x_title == "layer":
        axis.xaxis.get_major_locator().set_params(integer=True)
    if panel.log_x:
        scale(axis, "x", log_range([series.x for series in panel.series], 1.06))
    if panel.log_y:
        scale(axis, "y", spread(panel))
    if panel.ticks:
        places, labels = panel.ticks
        short = shorten(labels)
        if panel.lying:
            axis.set_yticks(list(places), short)
        else:
            turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted(panel, room) else {}
            axis.set_xticks(list(places), short, **turned)
            axis.set_xlim(-0.6, len(labels) - 0.4)
    if panel.floor:
        axis.axhspan(axis.get_ylim()[0], panel.floor[0], color="#ECECE8", zorder=0)
        axis.annotate(f"{panel.floor[1]} {panel.floor[0]:.2g}\N{DEGREE SIGN}", (0.01, panel.floor[0]), va="top",
                      xycoords=("axes fraction", "data"), fontsize=7.5, color=GREY)  # fmt: skip
    return None


def draw_strips(panel: Panel, axis):
    from matplotlib.colors import LinearSegmentedColormap

    heat = panel.heat
    assert heat is not None
    colours = LinearSegmentedColormap.from_list("relative", list(DIVERGING))
    edges = np.arange(len(heat.strips) + 1) - 0.5
    z = np.array(heat.z, dtype=np.float64)
    image = axis.pcolormesh(
        heat.edges, edges, z, cmap=colours, vmin=1 - heat.reach, vmax=1 + heat.reach, rasterized=True
    )
    axis.set_yticks(range(len(heat.strips)), shorten(heat.strips), fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.invert_yaxis()
    for place in panel.boundaries:
        axis.axvline(place, color="#111111", linewidth=0.6)
    return image


def draw_series(series: Series, axis) -> None:
    y = np.array([np.nan if value is None else value for value in series.y], dtype=np.float64)
    x = np.array([np.nan if value is None else value for value in series.x], dtype=np.float64)
    if series.marks == "bars":
        axis.bar(x, np.nan_to_num(y), width=series.width * 0.92, color=series.colour)
    elif series.marks == "band":
        top = np.array(series.top, dtype=np.float64)
        axis.fill_between(x, y, top, color=series.colour, alpha=BAND, linewidth=0)
    elif series.marks == "line":
        axis.plot(x, y, color=series.colour, linestyle=DASHES[series.dash], linewidth=series.width * 0.75)
        if np.isfinite(y).sum() == 1:
            axis.plot(x, y, "o", color=series.colour, markersize=4)
    else:
        axis.plot(x, y, linestyle="none", **look(series))


def look(series: Series) -> dict:
    """Marker arguments of points and ticks."""
    if series.marks == "ticks":
        return {"marker": "_", "markersize": 0.62 * series.width, "markeredgewidth": 1.6, "color": series.colour}
    face = "none" if series.symbol.endswith("open") else series.colour
    return {"marker": SYMBOLS[series.symbol], "markersize": 5.5, "markeredgewidth": 1.2, "color": series.colour,
            "markerfacecolor": face}  # fmt: skip


def handle(name: str, looks: list[Series]):
    """What stands for a series in the legend: its first line or mark."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    first = next((series for series in looks if series.marks != "band"), looks[0])
    if first.marks == "bars":
        return Patch(color=first.colour, label=name)
    if first.marks == "line":
        colour = INK if first.group and first.colour in RUN_COLOURS else first.colour
        return Line2D([], [], color=colour, linestyle=DASHES[first.dash], linewidth=1.6, label=name)
    large = {"markersize": 8} if first.marks == "ticks" else {}
    return Line2D([], [], linestyle="none", label=name, **look(first) | large)


def scale(axis, which: str, limits: tuple[float, float]) -> None:
    """A logarithmic axis between two powers of ten, with the page's ticks."""
    from matplotlib.ticker import NullLocator

    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}lim")(10.0 ** limits[0], 10.0 ** limits[1])
    places, labels = log_ticks(*limits)
    getattr(axis, f"{which}axis").set_minor_locator(NullLocator())
    getattr(axis, f"set_{which}ticks")(places, labels)
