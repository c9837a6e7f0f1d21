"""Principal angles: the largest by layer, and all k of chosen layers; with resolution and isotropic null."""

from __future__ import annotations

import numpy as np

from ..tables import Frame, Tables
from . import choose
from .model import Chart, Panel, Series, null_band, null_line, plain, run_line, span, thin
from .names import MOST_TOLD, run_names, told

SIDES = (("left", "output side, U"), ("right", "input side, V"))
ISOTROPIC = "if isotropic"
# degrees up to which the null's linear theory holds, as nulls.isotropic_angles states
NULL_HOLDS = 10.0
DRAWS = "Dotted: what an isotropic update of the same norm would give, median over draws{of}; the band around it runs "
DRAWS += "from the smallest draw to the largest. "
BEYOND = f"Above about {NULL_HOLDS:g}\N{DEGREE SIGN} that null is too small, and nothing follows from it. "


def degrees(value: float) -> str:
    return f"{value:.3g}\N{DEGREE SIGN}"


def null_text(null: bool, band: bool, of: str = "") -> str:
    """What the caption says of the null, given what was measured of it."""
    if not null:
        return "The angle of an isotropic update was not measured, so none of these can be called large or small. "
    if band:
        return DRAWS.format(of=of) + BEYOND
    return f"Dotted: one draw of an isotropic update of the same norm{of}; its scatter was not measured. " + BEYOND


def by_layer(tables: Tables) -> Chart | None:
    """Largest angle, median over a layer's matrices: one below resolution counts as the smallest."""
    rows = tables.geometry
    if rows is None or not rows.has("resolution_degrees"):
        return None
    layers = np.unique(rows.numbers("layer")[np.isfinite(rows.numbers("layer"))])
    if not len(layers):
        return None
    layers, names = layers[thin(len(layers), 256)], run_names(tables)
    floor = float(np.nanmax(rows.numbers("resolution_degrees")))
    panels, resolved, lines = [], [], []
    parts: dict[str, list[str]] = {run: [] for run in tables.runs}
    highest = dict.fromkeys(tables.runs, -np.inf)
    for side, title in SIDES:
        series = []
        for i, run in enumerate(tables.runs):
            mine = rows.where(rows.texts("run") == run)
            observed = medians(mine, f"{side}_degrees", layers, resolved=True)
            null, low, high = (medians(mine, f"{side}_degrees_isotropic{end}", layers) for end in ("", "_low", "_high"))
            hover = f"{run}, layer %{{x}}: %{{y:.3g}}\N{DEGREE SIGN}"
            if np.isfinite(low * high).any():
                series.append(null_band(i, ISOTROPIC, layers, low, high))
            series.append(run_line(i, names[run], layers, observed, hover))
            if np.isfinite(null).any():
                hover = f"{run}, if isotropic, layer %{{x}}: %{{y:.3g}}\N{DEGREE SIGN}"
                series.append(null_line(i, ISOTROPIC, layers, null, hover))
            known = observed[np.isfinite(observed)]
            said = f"{span(known.min(), known.max(), degrees)} {side}" if len(known) else f"none {side}"
            parts[run].append(said)
            highest[run] = max(highest[run], known.max(initial=-np.inf))
            resolved.append(len(known))
            lines.append(
                (run, side, *(f"{len(known)} of {len(layers)}",), *(middle(v) for v in (known, null, low, high)))
            )
        panels.append(Panel(f"{side} ({title})", series, x_title="layer", y_title="largest angle, degrees", log_y=True,
                            floor=(floor, "resolution")))  # fmt: skip
    every = {run: (float(highest[run]), f" {', '.join(said)}") for run, said in parts.items()}
    clear = f"Resolved in {span(min(resolved), max(resolved), '{:,}'.format)} of {len(layers):,} layers."
    nulls = null_text(rows.has("left_degrees_isotropic"), rows.has("left_degrees_isotropic_low"), ", as over matrices")
    return Chart(
        "angles-by-layer",
        "Largest principal angle by layer",
        "angles",
        f"Largest principal angle between top-k subspaces before and after tuning, by layer: {told(every, names)}. "
        f"{clear}",
        f"Median over the matrices of a layer; an angle below resolution counts as the smallest. {nulls}"
        "Shaded: below the coarsest resolution of any matrix.",
        panels,
        across=2,
        panel_height=330,
        header=("run", "side", "layers resolved", "median layer", ISOTROPIC, "smallest draw", "largest draw"),
        rows=lines,
    )


def middle(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return degrees(float(np.median(known))) if len(known) else "-"


def medians(rows: Frame, column: str, layers: np.ndarray, *, resolved: bool = False) -> np.ndarray:
    """Median over a layer's matrices; NaN where nothing is known, or, ``resolved``, where it is below resolution."""
    values, of = rows.numbers(column), rows.numbers("layer")
    result = np.full(len(layers), np.nan)
    for i, layer in enumerate(layers):
        found = values[of == layer]
        found = np.where(np.isfinite(found), found, -np.inf) if resolved else found[np.isfinite(found)]
        value = float(np.median(found)) if len(found) else np.nan
        result[i] = value if np.isfinite(value) else np.nan
    return result


def curves(tables: Tables) -> list[Chart]:
    """All k angles of each matrix of the chosen layers."""
    return [found for layer in choose.layers(tables) if (found := curves_of(tables, layer))]


def curves_of(tables: Tables, layer: int) -> Chart | None:
    matrices, names = choose.matrices(tables, layer), run_names(tables)
    stored = tables.chosen("curves", list(matrices.values()))
    if stored is None:
        return None
    rows = {(row["run"], row["name"]): row for row in stored.rows()}
    panels, known, everything = [], 0, 0
    largest: dict[str, float] = {}
    for kind, name in matrices.items():
        for side, _ in SIDES:
            series = []
            floors = []
            for i, run in enumerate(tables.runs):
                row = rows.get((run, name))
                if row is None or row[side] is None:
                    continue
                floors.append(row["resolution_degrees"] or 0.0)
                values = numbers(row[side])
                known, everything = known + int(np.isfinite(values).sum()), everything + len(values)
                if np.isfinite(values).any():
                    largest[run] = max(largest.get(run, 0.0), float(np.nanmax(values)))
                series += curve(i, run, names[run], row, side)
            if series:
                floor = (max(floors), "resolution") if max(floors) > 0 else None
                panels.append(Panel(f"{kind}, {side}", series, x_title="number of the angle", y_title="degrees",
                                    log_x=True, log_y=True, floor=floor))  # fmt: skip
    if not panels:
        return None
    many = len(names) > MOST_TOLD  # curves lie close: give them room
    found = {series.marks for panel in panels for series in panel.series if series.group}
    said = {run: (value, f" {degrees(value)}") for run, value in largest.items()}
    return Chart(
        f"angle-curves-layer-{layer}",
        f"All principal angles, layer {layer}",
        "angles",
        f"Principal angles of layer {layer}, from the largest to the smallest: {known:,} of {everything:,} angles are "
        f"above their resolution. Largest of any matrix: {told(said, names, ', ') or 'none resolved'}.",
        "Angle 1 is the largest. A curve ends where its angles fall below resolution (shaded): they are unknown there, "
        f"not zero. {null_text('line' in found, 'band' in found, ', at each number')}".rstrip(),
        panels,
        across=2 if many or len(panels) <= 4 else 4,
        panel_height=300 if many else 224,
    )


def numbers(values) -> np.ndarray:
    """A stored list, with NaN for null."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def curve(i: int, run: str, label: str, row: dict, side: str) -> list[Series]:
    """Angles against their number over their null, thinned evenly on the logarithmic axis."""
    picked = log_thin(len(row[side]))
    x = picked + 1
    null, low, high = (row.get(f"{side}_isotropic{end}") for end in ("", "_low", "_high"))
    found = []
    if low and high:
        found.append(null_band(i, ISOTROPIC, x, numbers(low)[picked], numbers(high)[picked]))
    hover = f"{run}, angle %{{x}}: %{{y:.3g}}\N{DEGREE SIGN}"
    found.append(run_line(i, label, x, plain(numbers(row[side])[picked]), hover, 1.8))
    if null:
        hover = f"{run}, if isotropic, angle %{{x}}: %{{y:.3g}}\N{DEGREE SIGN}"
        found.append(null_line(i, ISOTROPIC, x, plain(numbers(null)[picked]), hover))
    return found


def log_thin(length: int, most: int = 64) -> np.ndarray:
    if length <= most:
        return np.arange(length)
    return np.unique(np.geomspace(1, length, most).round().astype(int)) - 1
