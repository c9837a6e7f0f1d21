"""Share of the update's energy in the base's principal subspaces, by kind of module, beside isotropic values."""

from __future__ import annotations

import numpy as np

from ..tables import Tables
from .model import INK, Chart, Panel, Series, colour, dodge, plain, share

SIDES = (("left", "left: U_k'D"), ("right", "right: D V_k"), ("both", "both sides: U_k'D V_k"))


def chart(tables: Tables) -> Chart | None:
    rows = tables.geometry
    if rows is None or not rows.has("energy_both"):
        return None
    runs, kinds = tables.runs, list(dict.fromkeys(rows.texts("kind")))
    panels, lines = [], []
    for side, title in SIDES:
        series: list[Series] = []
        for i, run in enumerate(runs):
            mine = rows.where(rows.texts("run") == run)
            observed, null = (
                [median(mine.numbers(column)[mine.texts("kind") == kind]) for kind in kinds]
                for column in (f"energy_{side}", f"energy_{side}_isotropic")
            )
            x = [j + dodge(i, len(runs)) for j in range(len(kinds))]
            hover = [
                f"{run}, {kind}: {share(a)}; if isotropic {share(b)}"
                for kind, a, b in zip(kinds, observed, null, strict=True)
            ]
            series.append(Series(run, x, plain(100 * np.array(observed)), "points", colour(i), hover=hover))
            lines += [(run, kind, side, share(a), share(b)) for kind, a, b in zip(kinds, observed, null, strict=True)]
        # a null of shape alone, so the same for every run
        known = rows.numbers(f"energy_{side}_isotropic")
        nulls = [100 * median(known[rows.texts("kind") == kind]) for kind in kinds]
        series.append(Series("if isotropic", list(range(len(kinds))), plain(nulls), "ticks", INK))
        panels.append(
            Panel(title, series, y_title="% of ||D||\N{SUPERSCRIPT TWO}", log_y=True, ticks=(range(len(kinds)), kinds))
        )
    said = []
    for run in runs:
        mine = rows.where(rows.texts("run") == run)
        found, of_null = (share(median(mine.numbers(f"energy_both{end}"))) for end in ("", "_isotropic"))
        said.append(f"{run} {found} (isotropic {of_null})")
    return Chart(
        "energy",
        "Energy of the update in the base's principal subspaces",
        "energy",
        f"Share of the update's energy in both principal subspaces at once, median over matrices: {'; '.join(said)}.",
        "Energies are squared norms: a share of 1 % is a norm ratio of 10 %. Medians over the matrices of a kind; "
        "black strokes: k/m, k/n and k\N{SUPERSCRIPT TWO}/(mn), which an isotropic update would have.",
        panels,
        across=1 if len(kinds) > 10 else 3,
        panel_height=320,
        header=("run", "kind", "side", "share", "if isotropic"),
        rows=lines,
    )


def median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")
