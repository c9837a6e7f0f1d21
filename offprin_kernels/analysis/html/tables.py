"""The tables of the page: bounds, ledger, provenance, and the data of the table of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ..bounds import beside
from ..tables import Tables
from ..text import percent

EMPTY = "\N{EN DASH}"
MOST_TOLD = 40  # tensors that were not compared, of each run; summary.json has all


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", text: Sequence[int] = ()) -> str:
    """Cells are HTML already; ``text`` columns are set to the left, others to the right. A row of one cell spans "
    "all."""

    def line(tag: str, cells: Sequence[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{scope}{' class=text' if i in text else ''}>{cell}</{tag}>" for i, cell in enumerate(cells)
        )

    body = "".join(
        f'<tr class="group"><td colspan="{len(header)}">{row[0]}</td></tr>'
        if len(row) == 1
        else f"<tr>{line('td', row)}</tr>"
        for row in rows
    )
    head = f"<caption>{caption}</caption>" if caption else ""
    top = f"{head}<thead><tr>{line('th', header)}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def bounds(tables: Tables) -> str:
    """Empty where no spectra were measured."""
    rows: list[Sequence[str]] = []
    for found in beside(tables):
        if found.bound.name == "Mirsky":
            rows.append([escape(found.run)])
        medians = [value(number) for number in (found.observed, found.allowed)]
        rows.append(
            [
                found.bound.name, escape(found.bound.formula), f"{found.matrices:,}", f"{found.without:,}", *medians,
                found.bound.unit or EMPTY, percent(found.closest, 1) if found.closest is not None else EMPTY,
                f"{found.exceeded:,}" if found.matrices else EMPTY,
            ]
        )  # fmt: skip
    if not rows:
        return ""
    header = (
        "bound",
        "says",
        "matrices",
        "without",
        "observed, median",
        "bound, median",
        "unit",
        "closest",
        "exceeded",
    )
    return table(header, rows, text=(1, 6))


def value(number: float | None) -> str:
    return EMPTY if number is None else f"{number:.3g}"


def ledger(tables: Tables) -> str:
    """Counts of both sides of each run, and the first tensors that were not compared as they are."""
    found = tables.summary["ledger"]
    sides = list(dict.fromkeys(side for of_run in found.values() for side in of_run["counts"]))
    lines = [
        [escape(run), *(counted(of_run["counts"].get(side, {})) for side in sides)] for run, of_run in found.items()
    ]
    parts = [table(("run", *sides), lines, text=range(1, len(sides) + 1))]
    for run, of_run in found.items():
        told = [entry for entry in of_run["entries"] if entry["reason"]]
        if told:
            rows = [
                [
                    f'<span class="name">{escape(entry["name"])}</span>',
                    entry["side"],
                    entry["status"],
                    escape(entry["reason"]),
                ]
                for entry in told[:MOST_TOLD]
            ]
            parts.append(f"<h3>{escape(run)}</h3>{table(('tensor', 'side', 'status', 'why'), rows, text=(1, 2, 3))}")
        if len(told) > MOST_TOLD:
            parts.append(f"<p>And {len(told) - MOST_TOLD:,} more; <code>summary.json</code> lists all.</p>")
    for run in tables.summary["runs"]:
        if names := run.get("flagged_nonfinite"):
            parts.append(
                f'<p class="warning">NaN or Inf in {len(names):,} tensors of {escape(run["run"])}, left out of norms: '
                f"{escape(', '.join(names[:5]))}{' and others' if len(names) > 5 else ''}.</p>"
            )
    return "".join(parts)


def counted(statuses: dict[str, int]) -> str:
    return escape(", ".join(f"{n:,} {status}" for status, n in statuses.items() if n) or "none")


def provenance(tables: Tables) -> str:
    """Command, options, versions and files: enough to repeat it."""
    found, options = tables.summary["provenance"], tables.summary["options"]
    environment = found.get("environment", {})
    versions = ", ".join(f"{name} {version}" for name, version in environment.items() if version)
    chosen = ", ".join(f"{name} = {text(option)}" for name, option in options.items())
    items = [
        ("command", f"<code>{escape(' '.join(map(str, found.get('command', []))) or 'from Python')}</code>"),
        ("options", f"<code>{escape(chosen)}</code>"),
        ("versions", escape(versions)),
        ("base", source(found.get("base", {}))),
        *(
            (f"tuned: {escape(run)}", source(where))
            for run, where in zip(tables.runs, found.get("tuned", ()), strict=False)
        ),
    ]
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{words}</dd>' for name, words in items)}</dl>"


def text(option: object) -> str:
    return (", ".join(map(str, option)) or "none") if isinstance(option, list) else str(option)


def source(where: dict) -> str:
    files = where.get("files", [])
    size = sum(file["bytes"] for file in files)
    revision = f", revision {escape(str(where['revision']))}" if where.get("revision") else ""
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in where.get("dtypes", {}).items())
    return (
        f"{escape(str(where.get('source')))}{revision}<br><small>{escape(str(where.get('root')))}: {len(files):,} "
        f"files, {size:,} bytes, {where.get('tensors', 0):,} tensors ({escape(dtypes)})</small>"
    )


# title, column, kind, from which table
MATRIX_COLUMNS = (
    ("run", "run", "text", "tensors"),
    ("tensor", "name", "name", "tensors"),
    ("kind", "kind", "text", "tensors"),
    ("weights", "total", "count", "tensors"),
    ("changed", "changed", "count", "tensors"),
    ("sparsity", "sparsity", "percent", "tensors"),
    ("|D|/|W0|", "relative_update", "number", "tensors"),
    ("left angle", "left_degrees", "degrees", "geometry"),
    ("right angle", "right_degrees", "degrees", "geometry"),
    ("NSS", "nss", "number", "geometry"),
    ("NSS, top k", "nss_k", "number", "geometry"),
    ("energy, both", "energy_both", "percent", "geometry"),
)


def matrices(tables: Tables) -> dict:
    """What the page's script makes the table of all tensors from."""
    geometry = tables.geometry
    keys = list(zip(tables.tensors.texts("run"), tables.tensors.texts("name"), strict=True))
    index = (
        {}
        if geometry is None
        else {key: i for i, key in enumerate(zip(*map(geometry.texts, ("run", "name")), strict=True))}
    )
    columns, values = [], []
    for title, column, kind, where in MATRIX_COLUMNS:
        if where == "geometry":
            if geometry is None or not geometry.has(column):
                continue
            found = geometry.numbers(column)
            cells = [number(found[index[key]]) if key in index else None for key in keys]
        else:
            cells = [number(v) if kind in ("percent", "number") else v for v in tables.tensors.values(column)]
        columns.append({"title": title, "kind": kind})
        values.append(cells)
    return {"columns": columns, "rows": [list(row) for row in zip(*values, strict=True)]}


def number(found: float | None) -> float | None:
    return float(f"{found:.5g}") if found is not None and np.isfinite(found) else None
