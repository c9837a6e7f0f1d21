"""Agreement of runs: Jaccard by pair, by layer and by kind beside the nulls, and how many runs changed a weight."""

from __future__ import annotations

import numpy as np

from ..tables import Frame, Tables
from ..text import percent
from .model import GREY, INK, Chart, Panel, Series, plain, span, thin
from .names import run_names
from .nulls import EXPLAINED, NULLS, WHY_NOT, comparable, null_points

MOST_PAIRS = 30
MOST_RUN_LETTERS = 16  # of the two names that stand beside a pair
NULL_COLUMN = "intersection_isotropic"


def jaccards(rows: Frame) -> dict[str, float]:
    """Jaccard index of these tensors pooled, observed and by each null: sums over tensors, one division at the end.

    Observation and nulls are all of the tensors to which the isotropic null applies, where it applies to any.
    """
    rows = comparable(rows, NULL_COLUMN)
    a, b = rows.numbers("changed_a"), rows.numbers("changed_b")
    both, total = rows.numbers("intersection"), rows.numbers("total")
    uniform, exponent = a * b / np.maximum(total, 1), rows.numbers("intersection_exponent")
    parts = {
        "observed": (both, a + b - both),
        "uniform": (uniform, a + b - uniform),
        "exponent": (exponent, a + b - exponent),
        "margin": (rows.numbers("intersection_margin"), rows.numbers("union_margin")),
        "isotropic": (rows.numbers("intersection_isotropic"), rows.numbers("union_isotropic")),
    }
    return {
        key: float(top.sum() / bottom.sum()) if bottom.sum() > 0 else float("nan")
        for key, (top, bottom) in parts.items()
    }


def left_out(rows: Frame) -> str:
    """A sentence on the tensors that :func:`jaccards` leaves out; empty where there are none."""
    lost = len(rows) - len(comparable(rows, NULL_COLUMN))
    return f" In all sums, {lost:,} of {len(rows):,} pairs of tensors are left out: {WHY_NOT}." if lost else ""


def pairs(tables: Tables) -> Chart | None:
    rows, runs = tables.pairs, run_names(tables, MOST_RUN_LETTERS)
    if rows is None:
        return None
    found = []
    keys = list(dict.fromkeys(zip(rows.texts("run_a"), rows.texts("run_b"), strict=True)))
    for a, b in keys:
        found.append(
            (f"{runs[a]} ~ {runs[b]}", jaccards(rows.where((rows.texts("run_a") == a) & (rows.texts("run_b") == b))))
        )
    found = [item for item in found if np.isfinite(item[1]["observed"])]
    if not found:
        return None
    smallest = max(0, len(found) - MOST_PAIRS)
    if smallest:
        found = sorted(found, key=lambda item: -abs(item[1]["observed"] - item[1]["exponent"]))[:MOST_PAIRS]
    names, places = [name for name, _ in found], list(range(len(found)))[::-1]
    observed = [item["observed"] for _, item in found]
    hover = [f"{name}: {value:.4f}" for name, value in zip(names, observed, strict=True)]
    series = [Series("observed", plain(observed), places, "points", INK, symbol="circle", width=11, hover=hover)]
    for j, (null, (label, _)) in enumerate(NULLS.items()):
        y = [item[null] for _, item in found]
        if np.isfinite(y).any():
            # one above the other, so that nulls of equal value do not hide each other
            apart = [place + 0.27 - 0.18 * j for place in places]
            told = [f"{name}, {label}: {value:.4f}" for name, value in zip(names, y, strict=True)]
            marks = null_points(null, [], [], told)
            series.append(Series(marks.name, plain(y), apart, "points", marks.colour, symbol=marks.symbol, hover=told))
    excess = [item["observed"] - item["exponent"] for _, item in found]
    return Chart(
        "jaccard-pairs",
        f"Agreement of pairs of runs{tables.under}",
        "agreement",
        f"Jaccard index of {len(found)} pair{'s' if len(found) > 1 else ''}: "
        f"{span(min(observed), max(observed), '{:.3f}'.format)}; excess over the "
        f"exponent-conditioned null {span(min(excess), max(excess), '{:+.4f}'.format)}.",
        f"All coordinates pooled. {EXPLAINED}"
        + (f" The {smallest} pairs of smallest excess are left out." if smallest else "")
        + left_out(rows),
        [Panel("", series, x_title="Jaccard index", ticks=(places, names), lying=True)],
        panel_height=34 * len(found) + 90,
        header=("pair", "observed", *(label for label, _ in NULLS.values())),
        rows=[(name, *(number(item[key]) for key in ("observed", *NULLS))) for name, item in found],
    )


def by_group(tables: Tables) -> Chart | None:
    """Pooled over pairs of runs, and over a layer or a kind of module."""
    rows = tables.pairs
    if rows is None:
        return None
    rows = rows.where(np.array([bool(flag) for flag in rows.values("linear")]))
    layers = np.unique(rows.numbers("layer")[np.isfinite(rows.numbers("layer"))])
    layers = layers[thin(len(layers), 256)]
    kinds = list(dict.fromkeys(rows.texts("kind")))
    if not len(rows) or not len(layers):
        return None
    by_layer = [jaccards(rows.where(rows.numbers("layer") == layer)) for layer in layers]
    by_kind = [jaccards(rows.where(rows.texts("kind") == kind)) for kind in kinds]
    dashes = {"uniform": "dot", "exponent": "dash", "margin": "dashdot", "isotropic": "longdash"}
    lines, points = [], []
    for j, key in enumerate(("observed", *NULLS)):
        y = [item[key] for item in by_layer]
        if not np.isfinite(y).any():
            continue
        label, symbol = NULLS.get(key, ("observed", "circle"))
        hover = f"{label}, layer %{{x}}: %{{y:.4f}}"
        paint, width = (INK, 2.2) if key == "observed" else (GREY, 1.3)
        line = dashes.get(key, "solid")
        lines.append(Series(label, plain(layers), plain(y), colour=paint, dash=line, width=width, hover=hover))
        y = [item[key] for item in by_kind]
        told = [f"{label}, {kind}: {v:.4f}" for kind, v in zip(kinds, y, strict=True)]
        x = [i + (j - 2) * 0.13 for i in range(len(kinds))]
        points.append(Series(label, x, plain(y), "points", paint, symbol=symbol, hover=told))
    ratio = [item["observed"] - item["exponent"] for item in by_layer]
    if not np.isfinite(ratio).any():  # nothing changed
        return None
    best = int(np.nanargmax(ratio))
    return Chart(
        "jaccard-by-layer",
        f"Agreement by layer and by kind{tables.under}",
        "agreement",
        f"Jaccard index pooled over all pairs of runs. By layer, its excess over the exponent-conditioned null is "
        f"{span(float(np.nanmin(ratio)), float(np.nanmax(ratio)), '{:+.4f}'.format)}, "
        f"largest in layer {layers[best]:.0f}.",
        f"Linear layers only. Published values stand beside those of this analysis further below.{left_out(rows)}",
        [
            Panel("by layer", lines, x_title="layer", y_title="Jaccard index"),
            Panel("by kind", points, y_title="Jaccard index", ticks=(range(len(kinds)), kinds)),
        ],
        across=2,
        panel_height=330,
        header=("kind", "observed", *(label for label, _ in NULLS.values())),
        rows=[
            (kind, *(number(item[key]) for key in ("observed", *NULLS)))
            for kind, item in zip(kinds, by_kind, strict=True)
        ],
    )  # fmt: skip


def consensus(tables: Tables) -> Chart | None:
    """Weights changed by exactly j runs, of those that all runs have, beside independent runs."""
    found = tables.summary["consensus"]
    if not found or not found["total"]:
        return None
    x, total = list(range(found["runs"] + 1)), found["total"]
    names = {"coordinates": "observed", "expected_uniform": "if uniform", "expected_exponent": "if by exponent"}
    shares = {key: [100 * count / total for count in found[key]] for key in names}
    told = {
        key: [f"{name}, j = {j}: {v:.3f} %" for j, v in zip(x, shares[key], strict=True)] for key, name in names.items()
    }
    bars = Series("observed", x, plain(shares["coordinates"]), "bars", "#BCC3C9", width=0.6, hover=told["coordinates"])
    dots = [
        null_points("uniform", [j - 0.12 for j in x], shares["expected_uniform"], told["expected_uniform"]),
        null_points("exponent", [j + 0.12 for j in x], shares["expected_exponent"], told["expected_exponent"]),
    ]
    last = {key: values[-1] / 100 for key, values in shares.items()}
    return Chart(
        "consensus",
        f"How many runs changed a weight{tables.under}",
        "stripes",
        f"{percent(last['coordinates'], 2)} of {total:,} weights were changed by all {found['runs']} runs, "
        f"{percent(last['expected_exponent'], 2)} if runs were independent within each exponent; "
        f"{percent(shares['coordinates'][0] / 100, 2)} by none ({percent(shares['expected_exponent'][0] / 100, 2)}).",
        "Weights of tensors that all runs share. Nulls: runs independent, with each tensor's own density (uniform) or "
        "its density at each exponent of the base weight.",
        [
            Panel(
                "",
                [bars, *dots],
                x_title="changed by exactly j runs",
                y_title="% of weights",
                ticks=(x, list(map(str, x))),
            )
        ],
        panel_height=320,
        header=("j", *names.values()),
        rows=[(str(j), *(f"{shares[key][j]:.3f} %" for key in names)) for j in x],
    )


def number(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "-"
