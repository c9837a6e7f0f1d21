"""The summary in plain words: findings made of the numbers, and no claim without a null or below resolution."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np

from ..charts.model import listed
from ..charts.names import MOST_TOLD, run_names
from ..charts.nulls import left_out, listed_reasons
from ..charts.sparsity import NULL_COLUMN
from ..tables import Frame, Tables
from ..text import percent
from .agreement import agreement
from .directions import angles, energy, principal, spectrum
from .finding import CHANGED, CLEAR, ISOTROPIC, SMALL, Finding


def summary(tables: Tables) -> tuple[list[str], dict[str, list[Finding]]]:
    """What is said in short over all runs, and every run's findings."""
    found = {run: [finding for finding in of_run(tables, run) if finding] for run in tables.runs}
    short = [f"<b>{topic}</b>: {'; '.join(verdicts)}." for topic, verdicts in grouped(found, run_names(tables))]
    return short + ([agreement(tables)[0]] if len(tables.runs) > 1 else []), found


def grouped(found: dict[str, list[Finding]], names: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """By topic: each verdict with the runs that share it; of many different ones the two extremes."""
    topics = dict.fromkeys(finding.topic for findings in found.values() for finding in findings)
    for topic in topics:
        of_topic = [(run, finding) for run, findings in found.items() for finding in findings if finding.topic == topic]
        sharing: dict[str, list[str]] = {}
        for run, finding in of_topic:
            sharing.setdefault(finding.verdict, []).append(escape(names[run]))
        if len(found) == 1:
            yield topic, list(sharing)
        elif len(sharing) == 1 and len(of_topic) == len(found):
            yield topic, [f"{next(iter(sharing))} ({'both' if len(found) == 2 else f'all {len(found)}'} runs)"]
        elif len(sharing) > MOST_TOLD:
            known = sorted((item for item in of_topic if np.isfinite(item[1].value)), key=lambda item: item[1].value)
            ends = [f"{finding.verdict} ({escape(names[run])})" for run, finding in (known[:1] + known[-1:])]
            yield topic, [f"{len(of_topic)} runs, from {' to '.join(ends)}"]
        else:
            yield topic, [f"{verdict} ({several(runs, len(found))})" for verdict, runs in sharing.items()]


def several(runs: list[str], of: int) -> str:
    return listed(runs) if len(runs) <= MOST_TOLD else f"{len(runs)} of {of} runs"


def of_run(tables: Tables, run: str) -> Iterator[Finding | None]:
    rows = tables.tensors.where(tables.tensors.texts("run") == run)
    if not sum(rows.values("total")):
        yield Finding(topic_of(tables), "nothing was compared", "No weights were compared.")
        return
    yield changed(tables, rows)
    yield isotropic(tables, rows)
    if tables.geometry is not None:
        geometry = tables.geometry.where(tables.geometry.texts("run") == run)
        yield from (energy(geometry), angles(geometry), spectrum(geometry, tables.shift), principal(geometry))


def topic_of(tables: Tables) -> str:
    return "Visibly changed" if tables.rule == "bitwise" else f"{CHANGED}{escape(tables.under)}"


def changed(tables: Tables, rows: Frame) -> Finding:
    total, count = int(sum(rows.values("total"))), int(sum(rows.values("changed")))
    bitwise = tables.rule == "bitwise"
    how = "visibly changed (another value in bf16)" if bitwise else f"changed under the rule {escape(tables.rule)}"
    share, kept = percent(count / total, 2), percent(1 - count / total, 2)
    text = f"<b>{count:,} of {total:,}</b> weights ({share}) {how}; the rest, {kept}, did not."
    return Finding(topic_of(tables), share, text, count / total)


def isotropic(tables: Tables, rows: Frame) -> Finding:
    """More or fewer changes than an isotropic update of the same norm makes, over the tensors that have this null."""
    expected = rows.numbers(NULL_COLUMN)
    known = np.isfinite(expected) & (rows.numbers("total") > 0)
    if not known.any():
        return no_null(tables, rows)
    null, count, total = (float(v[known].sum()) for v in (expected, rows.numbers("changed"), rows.numbers("total")))
    deviation = np.sqrt(max(null * (1 - null / total), 0.0))
    lost = left_out(rows, NULL_COLUMN)
    told = f"An isotropic update of the same norm would change {percent(null / total, 2)}"
    beside = f" ({percent(count / total, 2)} of the same tensors; {lost})" if lost else ""
    if abs(count - null) <= max(CLEAR * deviation, SMALL * null):
        text = f"{told}: the run changed <b>about as many</b>{beside}, so its sparsity shows the update's size and "
        return Finding(ISOTROPIC, "about as many", f"{text}bf16's grid.")
    more = "more" if count > null else "fewer"
    by = f"{percent(abs(count / null - 1), 1)} {more}" if null else "some"
    return Finding(ISOTROPIC, more, f"{told}: the run changed <b>{by}</b>{beside}.")


def no_null(tables: Tables, rows: Frame) -> Finding:
    """Why nothing is said about more or fewer."""
    if tables.rule != "bitwise":
        text = f"The null of an isotropic update is one of rounding to bf16; the rule {escape(tables.rule)} has none."
        return Finding(ISOTROPIC, "no null for this rule", text)
    measured = NULL_COLUMN in rows.arrow.column_names
    why = f"cannot be told of these tensors ({listed_reasons(rows)})" if measured else "was not measured"
    return Finding(
        ISOTROPIC,
        "no null for these tensors" if measured else "not measured",
        f"How many an isotropic update of the same norm would change {why}: this share says how large the update is, "
        "and not where it acts.",
    )
