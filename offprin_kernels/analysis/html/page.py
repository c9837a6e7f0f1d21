"""Puts the report together: one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..._version import __version__
from ...output import OutputError, strict
from ..charts import Chart, charts
from ..charts.model import INK, colour
from ..charts.names import run_names
from ..reconciliation import reconcile
from ..tables import Tables
from . import published
from . import tables as parts
from .agreement import agreement
from .legend import legend
from .plot import figure, height
from .words import summary as in_words

HERE = Path(__file__).parent
MOST_ROWS = 120  # of a table of a figure's data
MOST_NAMES = 3  # of runs in the title
MOST_CARDS = 6  # of runs that are open from the start
SPECTRUM, ENERGY, MASKS = (
    f"Not measured (<code>--metrics {name}</code> adds it), or nothing changed."
    for name in ("spectrum", "energy", "masks")
)
# key, heading, what is said where there is nothing to show
SECTIONS = (
    ("sparsity", "Sparsity by layer and by kind of module", "No linear layers were compared."),
    ("stripes", "Where the changes lie: consensus, rows and columns", "No matrix changed, or no stripes are stored."),
    ("angles", "Principal angles", SPECTRUM),
    (
        "spectra",
        "Spectra",
        "Not measured, or by a version that did not keep the curves: <code>--metrics spectrum</code>.",
    ),
    ("nss", "Spectral shift", SPECTRUM),
    ("energy", "Energy in principal directions", ENERGY),
    ("overlap", "Principal, small and safe weights", MASKS),
    ("agreement", "Agreement of runs", "One run has none to agree with."),
)
COUNTING = ("sparsity", "stripes", "overlap", "agreement")  # of changed weights: they depend on the rule
REST = (
    ("bounds", "Bounds beside observations"),
    ("reconciliation", "What papers call sparsity and rotation"),
    ("matrices-section", "All tensors"),
    ("ledger", "Ledger: what was compared with what"),
    ("provenance", "Provenance"),
)
TOOLS = """
<div class="tools"><input id="filter" type="search" aria-label="Filter by run, name and kind"
placeholder="filter: run, name, kind"><button type="button" class="step" id="back">previous</button>
<button type="button" class="step" id="on">next</button><span id="where" aria-live="polite"></span></div>
<div class="scroll"><table id="matrices"></table></div><p class="lead">A dash: not measured, or below
resolution. The ".weight" at the end of names is left out.
All columns: <code>tensors.parquet</code> and <code>geometry.parquet</code>, or
<code>offprin_kernels.analysis.load</code>.</p>
"""
BOUNDS = """
<p>Medians over matrices; "of W": in the unit of the weights. <b>Closest</b>: the largest observation as a share of its
bound. <b>Without</b>: matrices where the bound says nothing (no gap, or a bound of 90 degrees and more) or the angle is
below resolution. Mirsky, Weyl and Ky Fan bound what an update can do at most, whatever its direction.
<b>Exceeded</b> counts violations beyond the measurement's own error, and should be 0.</p>
"""
DEFINITIONS = """
<p>The same word stands for different numbers in different papers: here is each definition, with its formula, source and
column. Values of sparsity pool all weights; those of rotation are medians over matrices, and their counts say how many
matrices have a value, of how many measured. <b>Inside</b> a published range says that the number alone could be of that
kind of run, not that it is one: ranges depend on model, data and learning rate. "About" is read as within a factor of
3.2. A ratio of norms is no energy: the energy is its square.</p>
"""
# No address but the file itself: a browser that reads this refuses every request.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


def build(tables: Tables) -> str:
    """The report as HTML. Equal input, equal text. Raises OutputError where plotly is missing."""
    script = plotly()
    found = charts(tables)
    title = title_of(tables.runs)
    body = [
        header(tables, title),
        *(
            section(key, heading + tables.under * (key in COUNTING), [c for c in found if c.section == key], missing)
            for key, heading, missing in SECTIONS
        ),
        *rest(tables),
    ]
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(title)}</title>\n",
            '<link rel="icon" href="data:,">\n',
            f"<style>\n{(HERE / 'page.css').read_text()}</style>\n</head>\n<body>\n",
            f'<div class="page">\n{contents()}\n<main>\n',
            "\n".join(body),
            "\n</main>\n</div>\n",
            "".join(data(f"data-{chart.key}", figure(chart)) for chart in found),
            data("data-matrices", parts.matrices(tables)),
            f"<script>{script}</script>\n",
            f"<script>\n{(HERE / 'page.js').read_text()}</script>\n</body>\n</html>\n",
        ]
    )


def title_of(runs: Sequence[str]) -> str:
    named = ", ".join(runs) if len(runs) <= MOST_NAMES else f"{len(runs)} runs"
    return f"{named} against {'its' if len(runs) == 1 else 'their'} base"


def plotly() -> str:
    """plotly.js, which is part of the Python package."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise OutputError("the report draws with plotly; pip install 'offprin-kernels[report]'") from None
    return get_plotlyjs().replace("</script", "<\\/script")


def data(key: str, value: dict) -> str:
    """JSON that a script reads; nothing in it can end its element."""
    text = json.dumps(strict(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(key)}">{text}</script>\n'


def contents() -> str:
    links = [("summary", "Summary"), *((key, heading) for key, heading, _ in SECTIONS), *REST]
    items = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading in links)
    return f'<nav aria-label="Contents"><ol>{items}</ol></nav>'


def header(tables: Tables, title: str) -> str:
    """Title, state, and the summary in words."""
    options, base = tables.summary["options"], tables.summary["provenance"].get("base", {})
    rule = options["rules"][0]
    state = ""
    if not tables.summary["complete"]:
        state = (
            '<p class="warning">Some tensors could not be compared; the <a href="#ledger">ledger</a> names them.</p>'
        )
    runs = len(tables.runs)
    lead = (
        f"{runs} tuned run{'s' if runs > 1 else ''} against <b>{escape(str(base.get('source', 'the base')))}</b>. A "
        f"weight counts as changed under the rule <code>{escape(rule)}</code>. Every number stands beside its null "
        "model, bound or resolution; where one is missing, nothing is claimed."
    )
    top = f'<h1>{escape(title)}</h1>\n<p class="lead">{lead}</p>{key_of_names(tables)}{state}'
    return f'{top}\n<section id="summary">{summary(tables)}</section>'


def summary(tables: Tables) -> str:
    """In short, then a card for each run, and one for their agreement."""
    short, findings = in_words(tables)
    found = [card("In short", short, INK)]
    shut = len(findings) > MOST_CARDS
    for i, (run, of_run) in enumerate(findings.items()):
        found.append(card(escape(run), [finding.text for finding in of_run], colour(i), shut))
    if len(findings) > 1:
        found.append(card("Do the runs agree?", agreement(tables), INK))
    return "\n".join(found)


def card(title: str, lines: Sequence[str], paint: str, shut: bool = False) -> str:
    """Sentences in a frame; ``shut``: only the title, until it is opened or printed."""
    told = f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"
    style = f'class="words" style="border-left-color:{paint}"'
    if shut:
        return f"<details {style.replace('words', 'words print')}><summary><b>{title}</b></summary>{told}</details>"
    return f"<div {style}><h3>{title}</h3>{told}</div>"


def key_of_names(tables: Tables) -> str:
    """What shortened names stand for; empty where none is."""
    names = run_names(tables)
    rows = [[escape(short), escape(run)] for run, short in names.items() if short != run]
    if not rows:
        return ""
    told = parts.table(("in figures", "run"), rows, text=(1,))
    return f'<details class="print"><summary>Names of the runs as figures shorten them</summary>{told}</details>'


def section(key: str, heading: str, found: Sequence[Chart], missing: str) -> str:
    body = "\n".join(map(picture, found)) or f'<p class="missing">{missing}</p>'
    return f'<section id="{key}"><h2>{escape(heading)}</h2>\n{body}</section>'


def picture(chart: Chart) -> str:
    """A figure with its message, caption and, where it is small, its data as a table."""
    rows = [[escape(cell) for cell in row] for row in chart.rows[:MOST_ROWS]]
    inside = ""
    if rows:
        more = f" (the first {MOST_ROWS} of {len(chart.rows)})" if len(chart.rows) > MOST_ROWS else ""
        told = parts.table([escape(cell) for cell in chart.header], rows)
        inside = f"<details><summary>Data{more}</summary>{told}</details>"
    return (
        f"<h3>{escape(chart.title)}</h3>\n<figure>{legend(chart)}"
        f'<div class="scroll"><div class="chart" id="{chart.key}" role="img" aria-label="{escape(chart.says)}" '
        f'style="height:{height(chart)}px"></div></div>'
        f'<figcaption><span class="says">{escape(chart.says)}</span> {escape(chart.caption)}{inside}</figcaption>'
        "</figure>"
    )


def rest(tables: Tables) -> list[str]:
    """Tables, from bounds to provenance."""
    texts = {
        "bounds": BOUNDS + (parts.bounds(tables) or f'<p class="missing">{SPECTRUM}</p>'),
        "reconciliation": DEFINITIONS + published.reconciliation(reconcile(tables)) + published.agreement(tables),
        "matrices-section": TOOLS,
        "ledger": parts.ledger(tables),
        "provenance": f'{parts.provenance(tables)}<p class="lead">Report by offprin-kernels {__version__}.</p>',
    }
    return [f'<section id="{key}"><h2>{heading}</h2>\n{texts[key]}</section>' for key, heading in REST]
