"""Tables of published values: definitions of sparsity and of rotation beside this analysis, and Jaccard indices."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from .. import published
from ..charts.agreement import jaccards, number
from ..charts.choose import PAPERS_LAYER
from ..reconciliation import Row
from ..tables import Tables
from .tables import EMPTY, table

MOST_RUNS = 5  # side by side; more get a table of their own
JACCARDS = """
<p>Jaccard index of changed weights, pooled over all pairs of runs, beside the published mean of five runs. It rises
with the share of weights that change: compare differences to the null if uniform, and even these with care.{where}</p>
"""


def reconciliation(rows: Sequence[Row]) -> str:
    """A line for each definition and set of tensors, a column for each run; a table for every few runs."""
    runs = list(dict.fromkeys(row.run for row in rows))
    few = [set(runs[start : start + MOST_RUNS]) for start in range(0, len(runs), MOST_RUNS)]
    return "".join(of_few([row for row in rows if row.run in some]) for some in few)


def of_few(rows: Sequence[Row]) -> str:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row.group, row.definition, row.scope), []).append(row)
    runs = list(dict.fromkeys(row.run for row in rows))
    body, group, definition = [], "", ""
    for of_runs in found.values():
        first = of_runs[0]
        if first.group != group:
            group = first.group
            body.append(f'<tr class="group"><td colspan="{3 + len(runs)}">{group}</td></tr>')
        about = ""
        if first.definition != definition:
            definition = first.definition
            scopes = sum(key[:2] == (group, definition) for key in found)
            about = (
                f'<td class="about" rowspan="{scopes}"><b>{escape(definition)}</b><br>{escape(first.formula)}<br>'
                f"<small>{escape(first.source)}<br><code>{escape(first.column)}</code></small></td>"
            )
        body.append(f"<tr>{about}{line(of_runs)}</tr>")
    heads = "".join(f'<th scope="col" class="run">{escape(run)}</th>' for run in runs)
    top = f'<th scope="col">definition</th><th scope="col" class="text">of</th><th scope="col">published</th>{heads}'
    inside = f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="wide">{inside}</table></div>'


def line(of_runs: list[Row]) -> str:
    """What runs share is said once: scope, tensors, published ranges, a note; and where nothing was counted, that."""
    first = of_runs[0]
    notes = {row.note for row in of_runs}
    shared = first.note if len(notes) == 1 and first.value is not None else ""
    ranges = [f"{kind} {text}" for kind, text in (("RLVR", first.rlvr), ("SFT", first.sft)) if text]
    alike = len({row.tensors for row in of_runs}) == 1
    told = [f"{first.tensors:,} tensors"] * alike + [escape(shared)] * bool(shared)
    cells = [
        f'<td class="text">{first.scope}{"".join(f"<br><small>{words}</small>" for words in told)}</td>',
        f"<td>{'<br>'.join(map(escape, ranges)) or EMPTY}</td>",
    ]
    flags = {(row.inside_rlvr, row.inside_sft) for row in of_runs}
    if (
        all(row.value is None for row in of_runs)
        and len({row.shown for row in of_runs}) == 1
        and flags == {(None, None)}
    ):
        return "".join(cells) + f'<td colspan="{len(of_runs)}" class="missing">{escape(first.shown)}</td>'
    return "".join(cells + [f"<td>{of_one(row, shared, alike)}</td>" for row in of_runs])


def of_one(row: Row, shared: str, alike: bool = True) -> str:
    """A value, whether it lies inside a published range, its counts, and its tensors where runs have different ones."""
    small = [row.note] if row.note not in ("", shared) and row.value is not None else []
    if row.numerator is not None and row.denominator:
        small.append(f"{row.numerator:,} / {row.denominator:,}")
    if not alike:
        small.append(f"{row.tensors:,} tensors")
    inside = [kind for kind, flag in (("RLVR", row.inside_rlvr), ("SFT", row.inside_sft)) if flag]
    flag = ""
    if inside:
        flag = f'<br><span class="inside">inside {" and ".join(inside)}</span>'
    elif row.inside_rlvr is False or row.inside_sft is False:
        flag = '<br><span class="outside">outside</span>'
    told = "".join(f"<br><small>{escape(words)}</small>" for words in small)
    return f"{escape(row.shown)}{flag}{told}"


def agreement(tables: Tables) -> str:
    """Observed Jaccard indices by kind of module beside published ones; empty where no kind has both."""
    rows = tables.pairs
    if rows is None:
        return ""
    rows = rows.where(np.array([bool(flag) for flag in rows.values("linear")], dtype=bool))
    of_layer = rows.where(rows.numbers("layer") == PAPERS_LAYER)
    where = (
        " Both are of layer 13." if len(of_layer) else " Published: layer 13, which is not here; observed: all layers."
    )
    rows, lines = of_layer if len(of_layer) else rows, []
    for kind, of_paper in published.JACCARD.items():
        found = jaccards(rows.where(rows.texts("kind") == kind))
        if np.isfinite(found["observed"]):
            lines.append([kind, *map(number, (found["observed"], found["uniform"], *of_paper))])
    if not lines:
        return ""
    header = ("kind", "observed", "if uniform", "published", "published, if uniform")
    caption = f"{published.PAPER}, Table 2"
    return JACCARDS.format(where=where) + table(header, lines, caption)
