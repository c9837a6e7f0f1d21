"""Sparsity by layer and by kind of module, beside that of an isotropic update."""

from __future__ import annotations

import numpy as np

from ..tables import Frame, Tables
from ..text import percent
from .model import INK, Chart, Panel, Series, colour, dodge, null_line, plain, run_line, span, thin

CAPTION = (
    "Sparsity is the share of weights whose bf16 value did not change, pooled over the linear layers of a {what}. "
    "{null} A run on its null shows nothing but the size of its update and the grid of bf16."
)
NULL = "{how}: the share that an isotropic Gaussian update of the same norm would leave unchanged."
NO_NULL = "The null of an isotropic update was not measured."


def shares(rows: Frame) -> tuple[float, float]:
    """(sparsity, that of an isotropic update of equal norm or NaN) of these tensors, pooled."""
    total = rows.numbers("total").sum()
    if not total:
        return float("nan"), float("nan")
    return float(1 - rows.numbers("changed").sum() / total), float(1 - rows.numbers("changed_isotropic").sum() / total)


def linear(tables: Tables) -> Frame:
    return tables.tensors.where(np.array([bool(flag) for flag in tables.tensors.values("linear")]))


def by_layer(tables: Tables) -> Chart | None:
    rows = linear(tables)
    layers = np.unique(rows.numbers("layer")[np.isfinite(rows.numbers("layer"))])
    if not len(layers):
        return None
    shown = layers[thin(len(layers), 256)]
    series, said, lines = [], [], []
    for i, run in enumerate(tables.runs):
        mine = rows.where(rows.texts("run") == run)
        found = np.array([shares(mine.where(mine.numbers("layer") == layer)) for layer in shown])
        observed, null = 100 * found[:, 0], 100 * found[:, 1]
        if not np.isfinite(observed).any():
            continue
        hover = f"{run}, layer %{{x}}: %{{y:.3f}} %"
        series.append(run_line(i, run, shown, observed, hover))
        if np.isfinite(null).any():
            told = f"{run}, if isotropic, layer %{{x}}: %{{y:.3f}} %"
            series.append(null_line(i, "if isotropic", shown, null, told))
        low, high = int(np.nanargmin(observed)), int(np.nanargmax(observed))
        places = (f"{observed[at]:.2f} % (layer {shown[at]:.0f})" for at in (low, high))
        said.append(f"{run}: from {' to '.join(places)}")
        lines.append(
            (run, f"{np.nanmin(observed):.3f} %", f"{np.nanmedian(observed):.3f} %", f"{np.nanmax(observed):.3f} %")
        )
    null_text = NULL.format(how="Dotted") if rows.has("changed_isotropic") else NO_NULL
    return Chart(
        "sparsity-by-layer",
        "Sparsity by layer",
        "sparsity",
        f"Sparsity over {len(layers)} layers. {'; '.join(said)}.",
        CAPTION.format(what="layer", null=null_text),
        [Panel("", series, x_title="layer", y_title="unchanged weights, %")],
        panel_height=340,
        header=("run", "lowest layer", "median layer", "highest layer"),
        rows=lines,
    )


def by_kind(tables: Tables) -> Chart | None:
    rows = linear(tables)
    kinds = list(dict.fromkeys(rows.texts("kind")))
    if not kinds:
        return None
    runs, series, lines = tables.runs, [], []
    extremes: list[tuple[float, str, str]] = []
    places: list[float] = []
    nulls: list[float] = []
    for i, run in enumerate(runs):
        mine = rows.where(rows.texts("run") == run)
        found = np.array([shares(mine.where(mine.texts("kind") == kind)) for kind in kinds])
        x = [j + dodge(i, len(runs)) for j in range(len(kinds))]
        hover = [f"{run}, {kind}: {percent(v)}" for kind, v in zip(kinds, found[:, 0], strict=True)]
        series.append(Series(run, x, plain(100 * found[:, 0]), "bars", colour(i), width=0.8 / len(runs), hover=hover))
        places, nulls = places + x, nulls + list(100 * found[:, 1])
        extremes += [(v, run, kind) for kind, v in zip(kinds, found[:, 0], strict=True) if np.isfinite(v)]
        lines += [
            (run, kind, percent(a), percent(b) if np.isfinite(b) else "-")
            for kind, (a, b) in zip(kinds, found, strict=True)
        ]
    if rows.has("changed_isotropic"):
        series.append(Series("if isotropic", places, plain(nulls), "ticks", INK))
    if not extremes:  # no weights
        return None
    low, high = min(extremes), max(extremes)
    return Chart(
        "sparsity-by-kind",
        "Sparsity by kind of module",
        "sparsity",
        f"Sparsity is {span(low[0], high[0], percent)} over runs and kinds of module: lowest in {low[2]} of {low[1]}, "
        f"highest in {high[2]} of {high[1]}.",
        CAPTION.format(what="kind", null=NULL.format(how="Black ticks") if rows.has("changed_isotropic") else NO_NULL),
        [Panel("", series, y_title="unchanged weights, %", ticks=(range(len(kinds)), kinds))],
        panel_height=340,
        header=("run", "kind", "sparsity", "if isotropic"),
        rows=lines,
    )  # fmt: skip
