"""Spectra: top-k singular values and their shifts in chosen layers; NSS by layer with its bound and null."""

from __future__ import annotations

import numpy as np

from ..schema import Shift
from ..tables import Frame, Tables
from . import choose
from .angles import log_thin, medians
from .energy import median
from .model import INK, Chart, Panel, Series, colour, null_line, plain, run_line, thin
from .names import MOST_TOLD, run_names, told


def values(tables: Tables) -> list[Chart]:
    return [found for layer in choose.layers(tables) if (found := values_of(tables, layer))]


def values_of(tables: Tables, layer: int) -> Chart | None:
    """Singular values before and after tuning, and how far each moved, beside the most that Weyl's bound allows."""
    matrices, names = choose.matrices(tables, layer), run_names(tables)
    stored, geometry = tables.chosen("curves", list(matrices.values())), tables.geometry
    if stored is None:
        return None
    rows = {(row["run"], row["name"]): row for row in stored.rows() if row["values_base"] and row["values_tuned"]}
    bounds = {}
    if geometry is not None:
        keys = zip(geometry.texts("run"), geometry.texts("name"), strict=True)
        bounds = dict(zip(keys, geometry.numbers("update_spectral_norm"), strict=True))
    panels: list[Panel] = []
    largest: dict[str, float] = {}
    for kind, name in matrices.items():
        of_name = [(i, run, rows[run, name]) for i, run in enumerate(tables.runs) if (run, name) in rows]
        if not of_name:
            continue
        base = np.array(of_name[0][2]["values_base"])
        picked = log_thin(len(base))
        x = [int(j) + 1 for j in picked]
        top = [Series("base", x, plain(base[picked]), colour=INK, width=4.0, hover=reads("base"))]
        moved = []
        for i, run, row in of_name:
            tuned, shift = np.array(row["values_tuned"])[picked], (np.array(row["values_tuned"]) - base)[picked]
            largest[run] = max(largest.get(run, 0.0), float(np.abs(shift).max() / base[0]))
            top.append(run_line(i, names[run], x, tuned, reads(run), 1.6))
            size = np.where(shift == 0, np.nan, np.abs(shift))
            signed = [f"{run}, shift of singular value {j}: {v:+.3g}" for j, v in zip(x, shift, strict=True)]
            moved.append(run_line(i, names[run], x, size, signed, 1.6))
            bound = bounds.get((run, name), np.nan)
            if np.isfinite(bound) and bound > 0:
                limit = [f"{run}, Weyl's bound: {bound:.3g}"] * 2
                moved.append(null_line(i, "at most (Weyl)", [1, len(base)], [bound] * 2, limit))
        for title, series, y_title in (("values", top, "singular value"), ("|shift|", moved, "|s(W+) - s(W0)|")):
            title, x_title = f"{kind}: {title}", "number of the value"
            panels.append(Panel(title, series, x_title=x_title, y_title=y_title, log_x=True, log_y=True))
    if not panels:
        return None
    said = told({run: (value, f" {100 * value:.2g} %") for run, value in largest.items()}, names, ", ")
    many = len(names) > MOST_TOLD
    return Chart(
        f"spectra-layer-{layer}",
        f"Spectra, layer {layer}",
        "spectra",
        f"Top singular values of layer {layer} before and after tuning. The largest shift of any, relative to the "
        f"largest singular value of its matrix: {said}.",
        "Where the curves of values lie on each other, the spectrum moved by less than a line's width; the panels "
        "of shifts show by how much it did, whichever the sign (hover for it). Dotted: no shift can exceed the "
        "spectral norm of the update (Weyl). Singular values are those of the certified top-k factors.",
        panels,
        across=2 if many or len(panels) <= 4 else 4,
        panel_height=300 if many else 224,
    )


def reads(name: str) -> str:
    return f"{name}, singular value %{{x}}: %{{y:.6g}}"


WHAT = {
    "nss": "NSS = ||s(W+) - s(W0)|| / ||s(W0)|| over the full spectrum, median over the matrices of a layer. It cannot "
    "exceed ||D|| / ||W0|| (Mirsky); a Gaussian update of the same norm gives about that over the root of the larger "
    "side.",
    "nss_k": "NSS = ||s(W+) - s(W0)|| / ||s(W0)|| over the k largest singular values, median over the matrices of a "
    "layer. It cannot exceed ||D|| over the norm of these values (Mirsky); a Gaussian update of the same norm gives "
    "about that times the root of k / (m n).",
}


def against_isotropic(rows: Frame, shift: Shift) -> tuple[float, float]:
    """(shift, its ratio to that of an isotropic update): medians over matrices, the one ratio of page and figure."""
    seen, null = rows.numbers(shift.observed), rows.numbers(shift.isotropic)
    return median(seen), median(np.divide(seen, null, out=np.full(len(rows), np.nan), where=null > 0))


def nss_by_layer(tables: Tables) -> Chart | None:
    rows = tables.geometry
    shift = tables.shift
    if rows is None or not rows.has(shift.observed):
        return None
    drawn = (
        (shift.observed, "observed", "solid", 2.0),
        (shift.isotropic, "if isotropic", "dot", 1.6),
        (shift.mirsky, "at most (Mirsky)", "dash", 1.6),
    )
    layers = np.unique(rows.numbers("layer")[np.isfinite(rows.numbers("layer"))])
    layers = layers[thin(len(layers), 256)]
    panels, said, lines, names = [], {}, [], run_names(tables)
    every = [rows.numbers(column) for column, *_ in drawn]
    positive = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in every])
    y_range = (float(positive.min()) / 1.5, float(positive.max()) * 1.5) if len(positive) else None
    for i, run in enumerate(tables.runs):
        mine = rows.where(rows.texts("run") == run)
        series, middle = [], {}
        for column, name, line, width in drawn:
            found = medians(mine, column, layers)
            middle[column] = np.nanmedian(found) if np.isfinite(found).any() else np.nan
            if np.isfinite(found).any():
                hover = f"{run}, {name}, layer %{{x}}: %{{y:.3e}}"
                paint = colour(i) if column == shift.observed else INK
                y, name = plain(np.where(found > 0, found, np.nan)), names[run] if column == shift.observed else name
                group = "" if column == shift.observed else name
                series.append(Series(name, plain(layers), y, "line", paint, line, width, hover=hover, group=group))
        if not series:
            continue
        panels.append(Panel(names[run], series, x_title="layer", y_title=shift.title, log_y=True, y_range=y_range))
        seen, ratio = against_isotropic(mine, shift)
        compared = f", {ratio:.2f} times that of an isotropic update" if np.isfinite(ratio) else ""
        said[run] = (seen, f" {seen:.2e}{compared}")
        lines.append((run, *(f"{middle[column]:.3e}" for column, *_ in drawn)))
    if not panels:
        return None
    return Chart(
        "nss-by-layer",
        "Normalized spectral shift by layer",
        "nss",
        f"Normalized spectral shift ({shift.title}), median over matrices: {told(said, names)}.",
        f"{WHAT[shift.observed]} Ratios are medians over matrices; the table has medians over layers.",
        panels,
        across=min(3, len(panels)),
        panel_height=250,
        header=("run", *(name for _, name, *_ in drawn)),
        rows=lines,
    )
