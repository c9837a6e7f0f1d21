"""Sparsity by layer and by kind of module, beside that of an isotropic update."""

from __future__ import annotations

import numpy as np

from ..tables import Frame, Tables
from ..text import percent
from .model import Chart, Panel, Series, colour, dodge, null_line, null_ticks, plain, run_line, span, thin
from .names import run_names, told
from .nulls import comparable, left_out

BITWISE = "whose bf16 value did not change"
CAPTION = "Sparsity is the share of weights {kept}, pooled over the linear layers of a {what}. {null}"
NULL = (
    "{how}: the share that an isotropic Gaussian update of the same norm would leave unchanged. A run on its null "
    "shows nothing but the size of its update and the grid of bf16."
)
NO_NULL = "The null of an isotropic update was not measured."
NOT_THIS_RULE = "The null of an isotropic update is one of rounding to bf16, and none of this rule."
NULL_COLUMN = "changed_isotropic"


def shares(rows: Frame) -> tuple[float, float]:
    """(sparsity, that of an isotropic update of equal norm or NaN) of these tensors, pooled over the same ones."""
    rows = comparable(rows, NULL_COLUMN)
    total = rows.numbers("total").sum()
    if not total:
        return float("nan"), float("nan")
    return float(1 - rows.numbers("changed").sum() / total), float(1 - rows.numbers(NULL_COLUMN).sum() / total)


def linear(tables: Tables) -> Frame:
    return tables.tensors.where(np.array([bool(flag) for flag in tables.tensors.values("linear")]))


def caption(tables: Tables, rows: Frame, what: str, how: str) -> str:
    """What sparsity means under this rule, what its null is, and what was left out of both."""
    bitwise = tables.rule == "bitwise"
    null = NULL.format(how=how) if rows.has(NULL_COLUMN) else NO_NULL if bitwise else NOT_THIS_RULE
    kept = BITWISE if bitwise else f"that did not change under the rule {tables.rule}"
    lost = left_out(rows, NULL_COLUMN)
    return CAPTION.format(kept=kept, what=what, null=null) + (f" Of all runs, {lost}." if lost else "")


def by_layer(tables: Tables) -> Chart | None:
    rows, names = linear(tables), run_names(tables)
    layers = np.unique(rows.numbers("layer")[np.isfinite(rows.numbers("layer"))])
    if not len(layers):
        return None
    shown = layers[thin(len(layers), 256)]
    series, said, lines = [], {}, []
    for i, run in enumerate(tables.runs):
        mine = rows.where(rows.texts("run") == run)
        found = np.array([shares(mine.where(mine.numbers("layer") == layer)) for layer in shown])
        observed, null = 100 * found[:, 0], 100 * found[:, 1]
        if not np.isfinite(observed).any():
            continue
        hover = f"{run}, layer %{{x}}: %{{y:.3f}} %"
        series.append(run_line(i, names[run], shown, observed, hover))
        if np.isfinite(null).any():
            of_null = f"{run}, if isotropic, layer %{{x}}: %{{y:.3f}} %"
            series.append(null_line(i, "if isotropic", shown, null, of_null))
        low, high = int(np.nanargmin(observed)), int(np.nanargmax(observed))
        places = (f"{observed[at]:.2f} % (layer {shown[at]:.0f})" for at in (low, high))
        said[run] = (float(np.nanmedian(observed)), f" from {' to '.join(places)}")
        lines.append(
            (run, f"{np.nanmin(observed):.3f} %", f"{np.nanmedian(observed):.3f} %", f"{np.nanmax(observed):.3f} %")
        )
    if not series:
        return None
    return Chart(
        "sparsity-by-layer",
        f"Sparsity by layer{tables.under}",
        "sparsity",
        f"Sparsity over {len(layers)} layers: {told(said, names)}.",
        caption(tables, rows, "layer", "Dotted"),
        [Panel("", series, x_title="layer", y_title="unchanged weights, %")],
        panel_height=340,
        header=("run", "lowest layer", "median layer", "highest layer"),
        rows=lines,
    )


def by_kind(tables: Tables) -> Chart | None:
    rows, names = linear(tables), run_names(tables)
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
        bars = plain(100 * found[:, 0])
        series.append(Series(names[run], x, bars, "bars", colour(i), width=0.8 / len(runs), hover=hover))
        places, nulls = places + x, nulls + list(100 * found[:, 1])
        extremes += [(v, names[run], kind) for kind, v in zip(kinds, found[:, 0], strict=True) if np.isfinite(v)]
        lines += [
            (run, kind, percent(a), percent(b) if np.isfinite(b) else "-")
            for kind, (a, b) in zip(kinds, found, strict=True)
        ]
    if rows.has(NULL_COLUMN):
        series.append(null_ticks("if isotropic", places, nulls, 0.8 * 880 / len(kinds) / len(runs)))
    if not extremes:  # no weights
        return None
    low, high = min(extremes), max(extremes)
    return Chart(
        "sparsity-by-kind",
        f"Sparsity by kind of module{tables.under}",
        "sparsity",
        f"Sparsity is {span(low[0], high[0], percent)} over runs and kinds of module: lowest in {low[2]} of {low[1]}, "
        f"highest in {high[2]} of {high[1]}.",
        caption(tables, rows, "kind", "Black ticks"),
        [Panel("", series, y_title="unchanged weights, %", ticks=(range(len(kinds)), kinds))],
        panel_height=340,
        header=("run", "kind", "sparsity", "if isotropic"),
        rows=lines,
    )
