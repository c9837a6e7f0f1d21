"""Share of the update's energy in the base's principal subspaces, by kind of module, beside isotropic values."""

from __future__ import annotations

import numpy as np

from ..tables import Frame, Tables
from .model import GREY, Chart, Panel, Series, colour, dodge, null_ticks, plain, share, symbol
from .names import run_names, told

SIDES = (("left", "left: U_k'D"), ("right", "right: D V_k"), ("both", "both sides: U_k'D V_k"))
ROUNDED, SHAPE = "if isotropic, rounded to bf16", "by shape alone"
MOST_BESIDE = 40  # points of a panel that leave room for two more beside it


def chart(tables: Tables) -> Chart | None:
    rows = tables.geometry
    if rows is None or not rows.has("energy_both"):
        return None
    runs, kinds, names = tables.runs, list(dict.fromkeys(rows.texts("kind"))), run_names(tables)
    across = 1 if len(kinds) > 10 or len(kinds) * len(runs) > MOST_BESIDE else 3
    panels, lines = [], []
    for side, title in SIDES:
        # a null of shape alone, so the same for every run: drawn across the kind, under the rest
        shape = [100 * middle(rows.where(rows.texts("kind") == kind), f"energy_{side}_isotropic") for kind in kinds]
        places = [x for j in range(len(kinds)) for x in (j - 0.42, j + 0.42, None)]
        level = plain([y for value in shape for y in (value, value, None)])
        series = [
            Series(SHAPE, places, level, "line", GREY, width=1.2, hover="k/m, k/n, k²/(mn): %{y:.3g} %", group=SHAPE)
        ]
        null_x: list[float] = []
        nulls: list[float] = []
        for i, run in enumerate(runs):
            mine = rows.where(rows.texts("run") == run)
            of_kind = [mine.where(mine.texts("kind") == kind) for kind in kinds]
            found = [
                [middle(some, f"energy_{side}{end}") for end in ("", "_rounded", "_isotropic")] for some in of_kind
            ]
            x = [j + dodge(i, len(runs)) for j in range(len(kinds))]
            hover = [
                f"{run}, {kind}: {share(a)}; if isotropic and rounded {share(b)}; by shape {share(c)}"
                for kind, (a, b, c) in zip(kinds, found, strict=True)
            ]
            observed = plain([100 * a for a, *_ in found])
            series.append(Series(names[run], x, observed, "points", colour(i), symbol=symbol(i), hover=hover))
            null_x, nulls = null_x + x, nulls + [100 * b for _, b, _ in found]
            lines += [(run, kind, side, *map(share, values)) for kind, values in zip(kinds, found, strict=True)]
        if np.isfinite(nulls).any():
            apart = 0.8 * 860 / across / len(kinds) / len(runs)
            series.append(null_ticks(ROUNDED, null_x, nulls, apart))
        panels.append(
            Panel(title, series, y_title="% of ||D||\N{SUPERSCRIPT TWO}", log_y=True, ticks=(range(len(kinds)), kinds))
        )
    said = {}
    for run in runs:
        mine = rows.where(rows.texts("run") == run)
        seen, null, shape_value = (middle(mine, f"energy_both{end}") for end in ("", "_rounded", "_isotropic"))
        beside = f"rounded isotropic {share(null)}, " if np.isfinite(null) else ""
        said[run] = (seen, f" {share(seen)} ({beside}by shape {share(shape_value)})")
    measured = rows.has("energy_both_rounded")
    return Chart(
        "energy",
        "Energy of the update in the base's principal subspaces",
        "energy",
        f"Share of the update's energy in both principal subspaces at once, median over matrices: {told(said, names)}.",
        "Energies are squared norms: a share of 1 % is a norm ratio of 10 %. Medians over the matrices of a kind. "
        + (
            "Black strokes: what a Gaussian update of the same norm has after rounding to bf16, the null here. "
            if measured
            else "What a Gaussian update has after rounding to bf16 was not measured: no share is large or small. "
        )
        + "Grey lines: k/m, k/n and k\N{SUPERSCRIPT TWO}/(mn), its shares before rounding, for reference.",
        panels,
        across=across,
        panel_height=320,
        header=("run", "kind", "side", "share", ROUNDED, SHAPE),
        rows=lines,
    )


def middle(rows: Frame, column: str) -> float:
    return median(rows.numbers(column))


def median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")
