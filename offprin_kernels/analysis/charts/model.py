"""The parts of a chart: series in panels, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..text import percent

# Colours that people with any colour vision tell apart (Okabe and Ito), and more for many runs, which then differ in
# dashes and symbols as well.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000", "#332288",
               "#AA4499", "#44AA99", "#999933", "#661100", "#6699CC", "#DDAA88")  # fmt: skip
ROUND = 8  # runs of solid lines and circles
INK, GREY = "#222222", "#6B6B6B"
DASHES = ("solid", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond")
DIVERGING = ((0.0, "#1B5E9B"), (0.25, "#8FBADB"), (0.5, "#F7F7F5"), (0.75, "#EDB27A"), (1.0, "#A8480A"))
MOST_POINTS = 64  # of a curve


@dataclass(frozen=True)
class Series:
    """Points of one thing. ``marks``: a line, points, bars, ticks (short strokes where a null model lies), or a band
    between ``y`` and ``top``."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    marks: Literal["line", "points", "bars", "ticks", "band"] = "line"
    colour: str = INK
    dash: str = "solid"  # solid, dash, dot, dashdot or longdash
    width: float = 2.0  # of lines and ticks in pixels, of bars in units of x
    symbol: str = "circle"
    hover: str | Sequence[str] = ()  # a text for each point, or one with %{x} and %{y} in it
    group: str = ""  # what the legend switches on and off; its name where empty
    top: Sequence[float | None] = ()  # of a band

    @property
    def key(self) -> str:
        return self.group or self.name


@dataclass(frozen=True)
class Heat:
    """Strips of colour: ``z[strip][bin]``, relative to 1."""

    strips: Sequence[str]
    edges: Sequence[float]  # of the bins, in rows or columns of the weight
    z: Sequence[Sequence[float | None]]
    reach: float  # colours run from 1 - reach to 1 + reach


@dataclass(frozen=True)
class Panel:
    title: str
    series: Sequence[Series] = ()
    heat: Heat | None = None
    x_title: str = ""
    y_title: str = ""
    log_x: bool = False
    log_y: bool = False
    ticks: tuple[Sequence[float], Sequence[str]] | None = None  # of the x axis, or of y where ``lying``
    lying: bool = False  # categories run down the y axis, values along x
    boundaries: Sequence[float] = ()  # vertical lines, as of attention heads
    floor: tuple[float, str] | None = None  # everything below this value is beyond resolution
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """One figure. ``says`` is its message in words: the alternative text, and the first sentence under it."""

    key: str
    title: str
    section: str
    says: str
    caption: str
    panels: Sequence[Panel] = ()
    across: int = 1  # panels in a row
    panel_height: int = 260
    header: Sequence[str] = ()  # of the table of its data, where that is small
    rows: Sequence[Sequence[str]] = field(default=())
    scale: str = ""  # what the colours of its strips mean

    @property
    def legend(self) -> dict[str, list[Series]]:
        """By name, in order of appearance and nulls of runs last: the first series of each kind of marks."""
        found: dict[str, dict[str, Series]] = {}
        for panel in self.panels:
            for series in panel.series:
                found.setdefault(series.key, {}).setdefault(series.marks, series)
        names = sorted(found, key=lambda name: any(series.group for series in found[name].values()))
        return {name: list(found[name].values()) for name in names}


def run_line(run: int, name: str, x, y, hover: str | Sequence[str], width: float = 2.0) -> Series:
    """The curve of a run, which has a colour of its own."""
    return Series(name, plain(x), plain(y), colour=colour(run), dash=dash(run), width=width, hover=hover)


def null_line(run: int, name: str, x, y, hover: str | Sequence[str]) -> Series:
    """What a null model, or a bound, says of a run: its colour, thin and dotted. One entry of the legend for all."""
    return Series(name, plain(x), plain(y), colour=colour(run), dash="dot", width=1.2, hover=hover, group=name)


def null_band(run: int, name: str, x, low, high) -> Series:
    """Where the draws of a null model lie, in the run's colour; the legend switches it with the null's line."""
    known = np.isfinite(low) & np.isfinite(high) & (np.asarray(low) > 0)
    x, low, high = (plain(np.asarray(values)[known]) for values in (x, low, high))
    return Series(name, x, low, "band", colour(run), group=name, top=high)


def null_ticks(name: str, x, y, apart: float) -> Series:
    """Short black strokes where a null model lies, no wider than the pixels ``apart`` that runs stand."""
    return Series(name, x, plain(y), "ticks", INK, width=max(4.0, min(13.0, apart)))


def colour(run: int) -> str:
    return RUN_COLOURS[run % len(RUN_COLOURS)]


def dash(run: int) -> str:
    return DASHES[run // ROUND % len(DASHES)]


def symbol(run: int) -> str:
    return SYMBOLS[run // ROUND % len(SYMBOLS)]


def thin(length: int, most: int = MOST_POINTS) -> np.ndarray:
    """At most that many indices out of ``length``, evenly spread, both ends included."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)) if length else np.arange(0)


def plain(values) -> list[float | None]:
    """Floats of six digits, which is more than an eye sees; None for what is missing."""
    return [float(f"{value:.6g}") if value is not None and np.isfinite(value) else None for value in values]


def dodge(run: int, runs: int, width: float = 0.8) -> float:
    """Where in a category of width 1 a run's mark stands, so that runs stand side by side."""
    return width * ((run + 0.5) / runs - 0.5)


def share(value: float, digits: int = 3) -> str:
    """In percent; a dash where it is not known."""
    return percent(value, digits) if np.isfinite(value) else "-"


def span(low: float, high: float, text) -> str:
    """``a`` or ``a to b``, where both read alike."""
    return text(low) if text(low) == text(high) else f"{text(low)} to {text(high)}"


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
