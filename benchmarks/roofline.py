"""``python -m benchmarks.roofline RESULT.json OUT.svg``: the rows of a result file under the roof measured beside them.

Left: work per second over work per byte, under copy bandwidth and the rates of matrix products. Right: each row's share
of its own ceiling, and the bar. Drawn from the newest run of the file in which both ceilings and rows were measured: of
it, slices of the same sources as the newest.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from offprin_kernels.analysis.charts.model import GREY, INK, RUN_COLOURS
from offprin_kernels.analysis.figures import STYLE
from offprin_kernels.checkpoint.write import atomic_write_bytes
from offprin_kernels.output import OutputError

from .gpu.results import read
from .gpu.timing import OF_CEILING

SIZE = (12.0, 5.4)  # inches: two panels in the width of a page, a dozen rows in its height
ROW = 0.24  # inches of height that a row of the right panel needs
PRODUCTS = ("bf16 product", "tf32 product", "fp32 product")
SAMPLE = "SAMPLE, not measured"
MARKS = "osD^vPX*"


def measured(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Slices that have rows to draw."""
    return {name: found for name, found in run["slices"].items() if found["status"] == "ok" and found.get("rows")}


def outdated(run: dict[str, Any]) -> list[str]:
    """Those of them that other sources than the newest were measured in: they are left out, and named."""
    slices = measured(run)
    newest = max(slices.values(), key=lambda found: found.get("at", ""), default={}).get("sources")
    return [name for name, found in slices.items() if found.get("sources") != newest]


def rows_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    left_out = outdated(run)
    return [row for name, found in measured(run).items() if name not in left_out for row in found["rows"]]


def ceilings_of(run: dict[str, Any]) -> dict[str, Any]:
    return run["slices"].get("ceilings", {}).get("ceilings", {})


def newest(file: dict[str, Any]) -> dict[str, Any]:
    """The last run with something to draw. Raises OutputError where there is none."""
    for run in reversed(file["runs"]):
        if "copy" in ceilings_of(run) and rows_of(run):
            return run
    raise OutputError("no run of this file has both ceilings and rows; measure both first")


def name_of(row: dict[str, Any]) -> str:
    backend = "" if row["backend"] == "triton" else f" [{row['backend']}]"
    dtype = row["sizes"].get("dtype")
    short = {"bfloat16": ", bf16", "float32": ", fp32"}.get(dtype, "")
    return f"{row['op']}, {row['case']}{short}{backend}"


def points(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float]]:
    """Row, work per byte, work per second; of rows that have both numbers."""
    return [
        (row, row["operations"] / row["bytes"], row["operations"] / row["ms"]["median"] * 1e3)
        for row in rows
        if row["operations"] and row["bytes"]
    ]


def title_of(file: dict[str, Any], run: dict[str, Any]) -> str:
    versions = run["versions"]
    tools = [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
    said = ", ".join([file["device"], run["date"], *tools])
    left_out = outdated(run)
    said += f"; left out, of older sources: {', '.join(left_out)}" if left_out else ""
    return f"{SAMPLE}: {said}" if run.get("sample") else said


def draw(file: dict[str, Any]):
    """A matplotlib figure of the file's newest run."""
    from matplotlib.figure import Figure

    run = newest(file)
    rows = [row for row in rows_of(run) if row["share"] is not None]
    figure = Figure(figsize=(SIZE[0], max(SIZE[1], 1.2 + ROW * len(rows))), layout="constrained")
    figure.suptitle(title_of(file, run), x=0.01, ha="left", fontweight="bold")
    left, right = figure.subplots(1, 2)
    draw_roof(left, run)
    draw_shares(right, rows)
    return figure


def draw_roof(axis, run: dict[str, Any]) -> None:
    found, placed = ceilings_of(run), points(rows_of(run))
    bandwidth = found["copy"]["value"] * 1e9
    rates = {name: found[name]["value"] * 1e12 for name in PRODUCTS if name in found}
    intensities = [x for _, x, _ in placed]
    ridge = max(rates.values(), default=bandwidth) / bandwidth
    # a factor of three beyond what is drawn, on either side
    span = np.geomspace(min([*intensities, 1.0]) / 3, max([*intensities, ridge]) * 3, 200)
    slope = span[span <= ridge]
    axis.plot(slope, slope * bandwidth, color=INK, linewidth=1.2)
    for name, rate in rates.items():
        axis.plot(span[span * bandwidth >= rate], np.full((span * bandwidth >= rate).sum(), rate), color=GREY, lw=1.2)
        axis.annotate(f"{name}, {rate / 1e12:.0f} TFLOP/s", (span[-1], rate), ha="right", va="bottom", fontsize=7.5)
    place = slope[-1] / 10  # on the slope, away from both ends
    axis.annotate(f"copy, {bandwidth / 1e9:.0f} GB/s", (place, place * bandwidth), ha="right", va="bottom",
                  xytext=(-4, 2), textcoords="offset points", fontsize=7.5)  # fmt: skip
    names = list(dict.fromkeys(row["op"] for row, _, _ in placed))
    for index, op in enumerate(names):
        own = [(x, y) for row, x, y in placed if row["op"] == op]
        axis.plot(*zip(*own, strict=True), MARKS[index % len(MARKS)], color=RUN_COLOURS[index % len(RUN_COLOURS)],
                  label=op, linestyle="none")  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that must move (a comparison or a popcount counts as one)")
    axis.set_ylabel("operations per second")
    axis.grid(color="#E6E6E2", linewidth=0.7)
    axis.set_axisbelow(True)
    if names:
        axis.legend(frameon=False, loc="lower right")


def draw_shares(axis, rows: list[dict[str, Any]]) -> None:
    """A stroke marks the bar on the share, where there is one."""
    places = np.arange(len(rows))
    axis.barh(places, [row["share"] for row in rows], color=RUN_COLOURS[0], height=0.6)
    for place, row in zip(places, rows, strict=True):
        bar = bar_of(row)
        if bar is not None:
            axis.plot([bar, bar], [place - 0.42, place + 0.42], color=RUN_COLOURS[1], linewidth=2)
        end = max(row["share"], bar or 0.0)
        axis.annotate(f"{row['share']:.2f} of {row['ceiling']['name']}", (end, place), va="center",
                      xytext=(4, 0), textcoords="offset points", fontsize=7)  # fmt: skip
    axis.set_yticks(places, [name_of(row) for row in rows], fontsize=7.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    # room for the words beside the longest bar
    axis.set_xlim(0, 1.4 * max([1.0, *(row["share"] for row in rows)]))
    axis.set_xlabel("share of the ceiling measured in turns with it; strokes: bars to meet")
    axis.spines[["top", "right"]].set_visible(False)


def bar_of(row: dict[str, Any]) -> float | None:
    """The bar on a row's share, None where it has none."""
    return next((ratio["bar"] for ratio in row["ratios"] if ratio["what"].startswith(OF_CEILING)), None)


def write(source: Path, target: Path) -> None:
    """Raises OutputError where matplotlib is missing or the file has nothing to draw, OSError where neither can be."""
    try:
        from matplotlib import rc_context
    except ModuleNotFoundError:
        raise OutputError("figures are drawn by matplotlib; pip install 'offprin-kernels[report]'") from None
    sink = io.BytesIO()
    with rc_context(STYLE):
        # no date, so that equal input makes equal files
        draw(read(source)).savefig(sink, format="svg", metadata={"Date": None})
    atomic_write_bytes(target, sink.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("source", metavar="RESULT.json", type=Path)
    parser.add_argument("target", metavar="OUT.svg", type=Path)
    chosen = parser.parse_args()
    try:
        write(chosen.source, chosen.target)
    except (OutputError, OSError) as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
