"""Ranges and ticks of logarithmic axes, the same whoever draws the chart."""

from __future__ import annotations

import math

import numpy as np

from .model import Panel


def log_range(columns, margin: float = 1.25) -> tuple[float, float]:
    """Powers of ten that hold all positive values, with a margin."""
    found = np.array([value for column in columns for value in column if value is not None], dtype=np.float64)
    found = found[np.isfinite(found) & (found > 0)]
    if not len(found):
        return -1.0, 0.0
    low, high = float(found.min()) / margin, float(found.max()) * margin
    return round(math.log10(low), 4), round(math.log10(high), 4)


def spread(panel: Panel) -> tuple[float, float]:
    """Of the y axis: the data, and a strip of what lies below resolution."""
    if panel.y_range:
        return round(math.log10(panel.y_range[0]), 4), round(math.log10(panel.y_range[1]), 4)
    columns = [values for series in panel.series for values in (series.y, series.top)]
    if panel.floor:
        columns = [*columns, [panel.floor[0] * 2]]
    low, high = log_range(columns)
    if panel.floor:
        # a strip below the floor, so that it is seen and has room for its name
        floor = math.log10(panel.floor[0])
        low = min(low, floor - max(0.35, 0.13 * (high - floor)))
    return low, high


SUPERSCRIPTS = str.maketrans("-0123456789", "\N{SUPERSCRIPT MINUS}⁰¹²³⁴⁵⁶⁷⁸⁹")


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Places and labels on a logarithmic axis, of which the powers of ten at either end are given."""
    decades = high - low
    factors = (1,) if decades > 1.6 else (1, 2, 5) if decades > 0.35 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    step = 1 + int(decades // 7)
    values = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1, step) for factor in factors]
    values = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    return values, [tick(value) for value in values]


def tick(value: float) -> str:
    """Plain where it is short, else a power of ten."""
    if 1e-3 <= value < 1e5:
        return f"{value:,.10g}"
    power = math.floor(math.log10(value) + 1e-9)
    factor = value / 10.0**power
    text = f"10{str(power).translate(SUPERSCRIPTS)}"
    return text if abs(factor - 1) < 1e-6 else f"{factor:.3g}\N{MULTIPLICATION SIGN}{text}"
