"""Which rows and columns of a weight the runs change: strips of relative density, one per run, heads marked."""

from __future__ import annotations

import numpy as np

from ..tables import Tables
from . import choose
from .model import Chart, Heat, Panel, listed
from .names import run_names

BINS = 160
MOST_STRIPS = 12
STRIPED = 1.5  # times chance, from which a matrix is called striped
CAPTION = (
    "Each strip is one run: a bin is the density of changed weights there over that of the whole matrix. {together}"
    "In a matrix without stripes, chance alone moves a bin by about {noise} (one standard deviation, mean over "
    "runs, the largest over panels). {heads}{shown}"
)
TOGETHER = "Stripes that stand at the same place in several strips are places on which the runs agree. "
HEADS = "Black lines bound the attention heads, as the base's config.json has them."
NO_HEADS = "Head boundaries are not drawn: the summary holds no config.json of the base that fits these shapes."


def chart(tables: Tables) -> list[Chart]:
    """A chart per chosen layer; none where no stripes are stored for it."""
    return [found for layer in choose.layers(tables) if (found := of_layer(tables, layer))]


def of_layer(tables: Tables, layer: int) -> Chart | None:
    matrices, names = choose.matrices(tables, layer), run_names(tables)
    stripes = tables.chosen("stripes", list(matrices.values()))
    if stripes is None:
        return None
    rows: dict[tuple[str, str], list[dict]] = {}
    for row in stripes.rows():
        rows.setdefault((row["name"], row["axis"]), []).append(row)
    found = [
        built
        for kind, name in matrices.items()
        for axis in ("row", "column")
        if (built := densities(tables, rows.get((name, axis), []), kind, axis))
    ]
    if not found:
        return None
    z = np.concatenate([np.abs(np.array(item["z"]) - 1).ravel() for item in found])
    reach = float(np.clip(np.quantile(z, 0.98), 0.02, 1.0))
    panels = [
        Panel(
            f"{item['kind']}, {item['axis']}s" + (f" ({item['heads']} heads)" if item["heads"] else ""),
            heat=Heat(
                [names[run] for run in item["strips"]],
                item["edges"].tolist(),
                np.round(item["z"], 4).tolist(),
                round(reach, 4),
            ),
            x_title=f"{item['axis']} of the weight",
            boundaries=np.linspace(0, item["length"], item["heads"] + 1)[1:-1].tolist() if item["heads"] else (),
        )
        for item in found
    ]
    strong = max(found, key=against_chance)
    times = against_chance(strong)
    strips = max(len(item["strips"]) for item in found)
    left = max(item["runs"] - len(item["strips"]) for item in found)
    noise = max(item["noise"] for item in found)
    tops = [
        f"{item['kind']} {item['axis']}s {100 * item['spread']:.1f} % ({100 * item['noise']:.1f} %)"
        for item in sorted(found, key=lambda item: -item["spread"])[:3]
    ]
    return Chart(
        f"stripes-layer-{layer}",
        f"Rows and columns that changed, layer {layer}{tables.under}",
        "stripes",
        f"Densities of changed weights by row and column in layer {layer}. Bins stray from the matrix's own density "
        f"most in {listed(tops)}; in brackets what chance brings. "
        + (
            f"Against chance, {strong['kind']} {strong['axis']}s are the most striped, {times:.1f} times."
            if times > STRIPED
            else f"None strays by more than {STRIPED:g} times that: no stripes are to be told from chance."
        ),
        CAPTION.format(
            together=TOGETHER if strips > 1 else "",
            noise=f"{100 * noise:.1f} %",
            heads=HEADS if any(item["heads"] for item in found) else NO_HEADS,
            shown=f" The first {strips} of {strips + left} runs that changed anything are shown." if left else "",
        ),
        panels,
        across=2,
        panel_height=14 * strips + 88,
        header=("matrix", "axis", "standard deviation of bins", "by chance"),
        rows=[
            (item["kind"], item["axis"], f"{100 * item['spread']:.2f} %", f"{100 * item['noise']:.2f} %")
            for item in found
        ],
        scale="density of changed weights, relative to the matrix",
    )  # fmt: skip


def densities(tables: Tables, rows: list[dict], kind: str, axis: str) -> dict | None:
    """Relative densities of bins by run; None where nothing changed, or a run's stripes are not there."""
    every = [row for row in rows if row["counts"] and row["length"] and sum(row["counts"])]
    rows = every[:MOST_STRIPS]
    if not rows:
        return None
    length, across = len(rows[0]["counts"]), rows[0]["length"]
    heads = choose.heads(tables.config, kind, axis, length)
    bins = min(length, heads * max(1, BINS // heads) if heads else BINS)
    edges = np.linspace(0, length, bins + 1).round().astype(int)
    z, chance = [], []
    for row in rows:
        counts = np.array(row["counts"], dtype=np.float64)
        density = counts.sum() / (length * across)
        means = np.add.reduceat(counts, edges[:-1]) / np.diff(edges) / across
        z.append(means / density)
        chance.append(float(np.sqrt((1 - density) / density / (across * np.diff(edges).mean()))))
    strips = [row["run"] for row in rows]
    spread, noise = float(np.mean([line.std() for line in z])), float(np.mean(chance))
    return {"kind": kind, "axis": axis, "length": length, "heads": heads, "edges": edges, "strips": strips, "z": z,
            "runs": len(every), "noise": noise, "spread": spread}  # fmt: skip


def against_chance(item: dict) -> float:
    """How far bins stray, in units of what chance brings."""
    return item["spread"] / item["noise"] if item["noise"] else 0.0
