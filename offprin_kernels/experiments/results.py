"""What an experiment leaves behind: ``table.md`` for people, ``rows.json`` for programs, ``figure.png`` for both."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.write import atomic_write_bytes
from ..output import dump, strict

Row = dict[str, Any]


@dataclass
class Result:
    """Rows of one table, and how to draw them."""

    title: str
    rows: list[Row]
    columns: dict[str, tuple[str, str]]  # key in a row -> heading, format specification
    notes: Sequence[str] = ()
    draw: Callable[[Any], None] | None = None  # takes a matplotlib figure
    size: tuple[float, float] = (9.0, 4.0)  # inches
    data: Row = field(default_factory=dict)  # what the figure shows beyond the rows

    def markdown(self) -> str:
        lines = [
            f"### {self.title}",
            "",
            f"| {' | '.join(heading for heading, _ in self.columns.values())} |",
            f"|{'---|' * len(self.columns)}",
        ]
        for row in self.rows:
            lines.append(f"| {' | '.join(cell(row.get(key), form) for key, (_, form) in self.columns.items())} |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def write(self, folder: Path) -> None:
        """Table, rows and figure; the figure needs matplotlib and is left out, with a word on it, without."""
        atomic_write_bytes(folder / "rows.json", dump(strict({"rows": self.rows, **self.data})))
        atomic_write_bytes(folder / "table.md", self.markdown().encode())
        if self.draw is None:
            return
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            print("offprin: no figure without matplotlib; pip install 'offprin-kernels[train]'", file=sys.stderr)
            return
        figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure)
        figure.savefig(folder / "figure.png", dpi=150)


def cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)


def logarithmic(axis: Any) -> None:
    """Labels at powers of ten only; those between run into each other."""
    from matplotlib.ticker import LogFormatterSciNotation, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    if high / low >= 10:
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(10, 0.4)))
    axis.set_tick_params(which="both", labelsize=7)


def read_rows(folder: Path) -> Row:
    return json.loads((folder / "rows.json").read_text())
