"""Principal angles: the largest by layer, and all k of chosen layers; with resolution and isotropic null."""

from __future__ import annotations

import numpy as np

from ..tables import Frame, Tables
from . import choose
from .model import Chart, Panel, Series, null_line, plain, run_line, span, thin

SIDES = (("left", "output side, U"), ("right", "input side, V"))


def degrees(value: float) -> str:
    return f"{value:.3g}\N{DEGREE SIGN}"


def by_layer(tables: Tables) -> Chart | None:
    """Largest angle, median over a layer's matrices: one below resolution counts as the smallest."""
    rows = tables.geometry
    if rows is None or not rows.has("resolution_degrees"):
        return None
    layers = np.unique(rows.numbers("layer")[np.isfinite(rows.numbers("layer"))])
    if not len(layers):
        return None
    layers = layers[thin(len(layers), 256)]
    floor = float(np.nanmax(rows.numbers("resolution_degrees")))
    panels, resolved = [], []
    told: dict[str, list[str]] = {run: [] for run in tables.runs}
    for side, title in SIDES:
        series = []
        for i, run in enumerate(tables.runs):
            mine = rows.where(rows.texts("run") == run)
            observed = medians(mine, f"{side}_degrees", layers, resolved=True)
            null = medians(mine, f"{side}_degrees_isotropic", layers)
            hover = f"{run}, layer %{{x}}: %{{y:.3g}}\N{DEGREE SIGN}"
            series.append(run_line(i, run, layers, observed, hover))
            if np.isfinite(null).any():
                hover = f"{run}, if isotropic, layer %{{x}}: %{{y:.3g}}\N{DEGREE SIGN}"
                series.append(null_line(i, "if isotropic", layers, null, hover))
            known = observed[np.isfinite(observed)]
            told[run].append(f"{span(known.min(), known.max(), degrees)} {side}" if len(known) else f"none {side}")
            resolved.append(len(known))
        panels.append(Panel(f"{side} ({title})", series, x_title="layer", y_title="largest angle, degrees", log_y=True,
                            floor=(floor, "resolution")))  # fmt: skip
    said = [f"{run}: {', '.join(parts)}" for run, parts in told.items()]
    clear = f"Resolved in {span(min(resolved), max(resolved), '{:,}'.format)} of {len(layers):,} layers."
    null_text = (
        "Dotted: what an isotropic update of the same norm would give. "
        if rows.has("left_degrees_isotropic")
        else "The angle of an isotropic update was not measured, so none of these can be called large or small. "
    )
    return Chart(
        "angles-by-layer",
        "Largest principal angle by layer",
        "angles",
        f"Largest principal angle between top-k subspaces before and after tuning, by layer. {'; '.join(said)}. "
        f"{clear}",
        f"Median over the matrices of a layer; an angle below resolution counts as the smallest. {null_text}"
        "Shaded: below the coarsest resolution of any matrix.",
        panels,
        across=2,
        panel_height=330,
    )


def medians(rows: Frame, column: str, layers: np.ndarray, *, resolved: bool = False) -> np.ndarray:
    """Median over a layer's matrices; NaN where nothing is known, or, ``resolved``, where it is below resolution."""
    values, of = rows.numbers(column), rows.numbers("layer")
    result = np.full(len(layers), np.nan)
    for i, layer in enumerate(layers):
        found = values[of == layer]
        found = np.where(np.isfinite(found), found, -np.inf) if resolved else found[np.isfinite(found)]
        middle = float(np.median(found)) if len(found) else np.nan
        result[i] = middle if np.isfinite(middle) else np.nan
    return result


def curves(tables: Tables) -> list[Chart]:
    """All k angles of each matrix of the chosen layers."""
    return [found for layer in choose.layers(tables) if (found := curves_of(tables, layer))]


def curves_of(tables: Tables, layer: int) -> Chart | None:
    names = choose.matrices(tables, layer)
    stored = tables.chosen("curves", list(names.values()))
    if stored is None:
        return None
    rows = {(row["run"], row["name"]): row for row in stored.rows()}
    panels, known, everything, nulls = [], 0, 0, False
    largest: dict[str, float] = {}
    for kind, name in names.items():
        for side, _ in SIDES:
            series = []
            floors = []
            for i, run in enumerate(tables.runs):
                row = rows.get((run, name))
                if row is None or row[side] is None:
                    continue
                floors.append(row["resolution_degrees"] or 0.0)
                values = [np.nan if value is None else value for value in row[side]]
                known, everything = known + int(np.isfinite(values).sum()), everything + len(values)
                if np.isfinite(values).any():
                    largest[run] = max(largest.get(run, 0.0), float(np.nanmax(values)))
                series.append(curve(run, values, i))
                if row.get(f"{side}_isotropic"):
                    nulls = True
                    series.append(curve(run, row[f"{side}_isotropic"], i, null=True))
            if series:
                floor = (max(floors), "resolution") if max(floors) > 0 else None
                panels.append(Panel(f"{kind}, {side}", series, y_title="degrees", log_x=True, log_y=True, floor=floor))
    if not panels:
        return None
    return Chart(
        f"angle-curves-layer-{layer}",
        f"All principal angles, layer {layer}",
        "angles",
        f"Principal angles of layer {layer}, from the largest to the smallest: {known:,} of {everything:,} angles are "
        "above their resolution. Largest of any matrix: "
        + (", ".join(f"{run} {degrees(value)}" for run, value in largest.items()) or "none resolved")
        + ".",
        "Angle 1 is the largest. A curve ends where its angles fall below resolution (shaded): they are unknown there, "
        "not zero. "
        + (
            "Dotted: the angles that an isotropic update of the same norm would give (expected values; their "
            "spread was not measured)."
            if nulls
            else "The angles of an isotropic update were not measured."
        ),
        panels,
        across=4 if len(panels) > 4 else 2,
        panel_height=200,
    )


def curve(run: str, values, i: int, null: bool = False) -> Series:
    """Angles against their number, thinned evenly on the logarithmic axis."""
    picked = log_thin(len(values))
    x, y = picked + 1, plain([values[j] for j in picked])
    name = f"{run}, if isotropic" if null else run
    hover = f"{name}, angle %{{x}}: %{{y:.3g}}\N{DEGREE SIGN}"
    return null_line(i, "if isotropic", x, y, hover) if null else run_line(i, name, x, y, hover, 1.8)


def log_thin(length: int, most: int = 64) -> np.ndarray:
    if length <= most:
        return np.arange(length)
    return np.unique(np.geomspace(1, length, most).round().astype(int)) - 1
