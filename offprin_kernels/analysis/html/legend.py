"""Legends as HTML: they wrap where names are long, and a click hides what they name."""

from __future__ import annotations

from html import escape

from ..charts.model import DIVERGING, INK, RUN_COLOURS, Chart, Series

DASHES = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 4"}
SYMBOLS = {
    "circle": '<circle cx="{x}" cy="6" r="4" fill="{c}"/>',
    "square": '<rect x="{a}" y="2" width="8" height="8" fill="{c}"/>',
    "diamond": '<path d="M{x} 1l5 5-5 5-5-5z" fill="{c}"/>',
    "circle-open": '<circle cx="{x}" cy="6" r="4" fill="none" stroke="{c}" stroke-width="1.8"/>',
    "square-open": '<rect x="{a}" y="2" width="8" height="8" fill="none" stroke="{c}" stroke-width="1.8"/>',
    "diamond-open": '<path d="M{x} 1l5 5-5 5-5-5z" fill="none" stroke="{c}" stroke-width="1.8"/>',
    "x-thin": '<path d="M{a} 2l8 8m0-8l-8 8" stroke="{c}" stroke-width="1.8"/>',
}


def legend(chart: Chart) -> str:
    """Buttons, one for each name; for strips the ramp of colours; empty where one series explains itself."""
    if chart.scale:
        return ramp(chart)
    names = chart.legend
    if len(names) < 2:
        return ""
    buttons = [
        f'<button type="button" aria-pressed="true" data-group="{escape(name)}">'
        f"{''.join(map(swatch, looks))}{escape(name)}</button>"
        for name, looks in names.items()
    ]
    return f'<div class="legend">{"".join(buttons)}</div>'


def swatch(series: Series) -> str:
    """How the series looks, as a small picture."""
    if series.marks == "bars":
        return picture(12, f'<rect width="12" height="12" fill="{series.colour}"/>')
    if series.marks == "ticks":
        return picture(14, f'<path d="M0 6h14" stroke="{series.colour}" stroke-width="2.4"/>')
    if series.marks == "band":
        return picture(14, f'<rect y="1" width="14" height="10" fill="{INK}" opacity="0.2"/>')
    if series.marks == "points":
        return picture(12, SYMBOLS[series.symbol].format(x=6, a=2, c=series.colour))
    colour = INK if series.group and series.colour in RUN_COLOURS else series.colour
    pattern = DASHES[series.dash]
    dashes = f' stroke-dasharray="{pattern}"' if pattern else ""
    return picture(28, f'<path d="M0 6h28" stroke="{colour}" stroke-width="{min(4, max(1.6, series.width))}"{dashes}/>')


def picture(width: int, inside: str) -> str:
    return f'<svg width="{width}" height="12" aria-hidden="true">{inside}</svg>'


def ramp(chart: Chart) -> str:
    """Colours of the strips, with what they mean at either end."""
    reach = 100 * max(panel.heat.reach for panel in chart.panels if panel.heat)
    stops = ", ".join(f"{colour} {100 * at:g}%" for at, colour in DIVERGING)
    return (
        f'<div class="ramp"><span>\N{MINUS SIGN}{reach:.3g} % or less</span>'
        f'<i style="background:linear-gradient(90deg, {stops})"></i><span>+{reach:.3g} % or more</span>'
        f"<span>({escape(chart.scale)})</span></div>"
    )
