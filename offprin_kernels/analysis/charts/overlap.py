"""Changed weights inside the weight masks of the base, beside four nulls."""

from __future__ import annotations

import numpy as np

from ..tables import Frame, Tables
from ..text import percent
from .model import Chart, Panel, Series, colour, plain, share, symbol
from .names import run_names, told
from .nulls import EXPLAINED, NULLS, comparable, left_out, null_points

MOST_BESIDE = 6  # runs of a panel that leave room for two more beside it
MASKS = {"principal": "principal weights", "low": "smallest weights", "safe": "safe: smallest, or not principal"}


def chart(tables: Tables) -> Chart | None:
    rows = tables.geometry
    if rows is None or not rows.has("principal_changed"):
        return None
    runs, names, panels, lines, said = tables.runs, run_names(tables), [], [], {}
    measured = [null for null in NULLS if rows.has(f"principal_expected_{null}")]
    for mask, title in MASKS.items():
        series, found = [], []
        for i, run in enumerate(runs):
            mine = rows.where(rows.texts("run") == run)
            shares = pooled(mine, mask)
            found.append(shares)
            hover = [f"{run}: {percent(shares['observed'])}"]
            series.append(
                Series(
                    names[run],
                    [i - 0.3],
                    plain([100 * shares["observed"]]),
                    "points",
                    colour(i),
                    symbol=symbol(i),
                    hover=hover,
                )
            )
            lines.append((run, mask, *(share(shares[key]) for key in ("observed", *NULLS))))
            if mask == "principal" and np.isfinite(shares["exponent"]):
                both = (percent(shares[key], 2) for key in ("observed", "exponent"))
                said[run] = (shares["observed"], f" {' against '.join(both)} by exponent")
        for j, null in enumerate(measured):
            # side by side, so that nulls of equal value do not hide each other
            x = [i - 0.1 + j * 0.14 for i in range(len(runs))]
            y = [100 * shares[null] for shares in found]
            hover = [f"{run}, {NULLS[null][0]}: {v:.3f} %" for run, v in zip(runs, y, strict=True)]
            series.append(null_points(null, x, y, hover))
        panels.append(
            Panel(title, series, y_title="% of changed weights", ticks=(range(len(runs)), list(names.values())))
        )
    if not said:  # nothing changed
        return None
    lost = left_out(rows, "principal_expected_isotropic", "matrices of all runs")
    missing = [NULLS[null][0] for null in NULLS if null not in measured]
    return Chart(
        "overlap",
        f"Where the changed weights lie{tables.under}",
        "overlap",
        f"Share of changed weights among principal weights: {told(said, names)}.",
        EXPLAINED
        + (f" Not measured: {', '.join(missing)}." if missing else "")
        + (f" In the sums, {lost}." if lost else ""),
        panels,
        across=3 if len(runs) <= MOST_BESIDE else 1,
        panel_height=340,
        header=("run", "weight mask", "observed", *(name for name, _ in NULLS.values())),
        rows=lines,
    )


def pooled(rows: Frame, mask: str) -> dict[str, float]:
    """Shares of all changed weights of these matrices that lie in the mask: observed, and by each null."""
    rows = comparable(rows, f"{mask}_expected_isotropic")
    changed = rows.numbers("changed").sum()
    if not changed > 0:
        return dict.fromkeys(("observed", *NULLS), float("nan"))
    result = {"observed": float(rows.numbers(f"{mask}_changed").sum() / changed)}
    return result | {null: float(rows.numbers(f"{mask}_expected_{null}").sum() / changed) for null in NULLS}
