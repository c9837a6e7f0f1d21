"""The summary in plain words: findings made of the numbers, and no claim without a null or below resolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np

from ..charts.energy import median
from ..charts.model import listed
from ..schema import Shift
from ..tables import Frame, Tables
from ..text import percent
from .agreement import CLEAR, agreement

SMALL = 0.01  # relative differences below this are "about as many": the null itself is an estimate
MATCH = 2 / 3  # share of matrices above which a difference is called clear

# What a finding is about, as the short summary calls it.
CHANGED = "Visibly changed"
ISOTROPIC = "Changed weights, against an isotropic update of the same norm"
ENERGY = "Energy of the update in principal directions"
ANGLES = "Largest principal angles, against an isotropic update"
SPECTRUM = "Shift of the spectrum, against an isotropic update"
PRINCIPAL = "Changes among principal weights, against what exponents alone bring"


@dataclass(frozen=True)
class Finding:
    """``verdict`` is a few words, which runs may share; ``text`` is a whole sentence of HTML with the numbers."""

    topic: str
    verdict: str
    text: str


def summary(tables: Tables) -> tuple[list[str], dict[str, list[Finding]]]:
    """What is said in short over all runs, and every run's findings."""
    found = {run: [finding for finding in of_run(tables, run) if finding] for run in tables.runs}
    short = [f"<b>{topic}</b>: {'; '.join(verdicts)}." for topic, verdicts in grouped(found)]
    return short + ([agreement(tables)[0]] if len(tables.runs) > 1 else []), found


def grouped(found: dict[str, list[Finding]]) -> Iterator[tuple[str, list[str]]]:
    """By topic: each verdict with the runs that share it."""
    topics = dict.fromkeys(finding.topic for findings in found.values() for finding in findings)
    for topic in topics:
        sharing: dict[str, list[str]] = {}
        for run, findings in found.items():
            for finding in findings:
                if finding.topic == topic:
                    sharing.setdefault(finding.verdict, []).append(escape(run))
        if len(found) == 1:
            yield topic, list(sharing)
        elif len(sharing) == 1 and len(next(iter(sharing.values()))) == len(found):
            yield topic, [f"{next(iter(sharing))} ({'both' if len(found) == 2 else f'all {len(found)}'} runs)"]
        else:
            yield topic, [f"{verdict} ({listed(runs)})" for verdict, runs in sharing.items()]


def of_run(tables: Tables, run: str) -> Iterator[Finding | None]:
    rows = tables.tensors.where(tables.tensors.texts("run") == run)
    if not sum(rows.values("total")):
        yield Finding(CHANGED, "nothing was compared", "No weights were compared.")
        return
    yield changed(tables, rows)
    yield isotropic(rows)
    if tables.geometry is not None:
        geometry = tables.geometry.where(tables.geometry.texts("run") == run)
        yield from (energy(geometry), angles(geometry), spectrum(geometry, tables.shift), principal(geometry))


def changed(tables: Tables, rows: Frame) -> Finding:
    total, count = int(sum(rows.values("total"))), int(sum(rows.values("changed")))
    rule = tables.summary["options"]["rules"][0]
    how = "visibly changed (another value in bf16)" if rule == "bitwise" else f"changed under the rule {escape(rule)}"
    share, kept = percent(count / total, 2), percent(1 - count / total, 2)
    return Finding(CHANGED, share, f"<b>{count:,} of {total:,}</b> weights ({share}) {how}; the rest, {kept}, did not.")


def isotropic(rows: Frame) -> Finding:
    """More or fewer changes than an isotropic update of the same norm makes."""
    expected = rows.numbers("changed_isotropic")
    known = np.isfinite(expected) & (rows.numbers("total") > 0)
    if not known.any():
        return Finding(
            ISOTROPIC,
            "not measured",
            "How many an isotropic update of the same norm would change was not measured: this share says how large "
            "the update is, and not where it acts.",
        )
    null, count, total = (float(v[known].sum()) for v in (expected, rows.numbers("changed"), rows.numbers("total")))
    deviation = np.sqrt(max(null * (1 - null / total), 0.0))
    where = "" if known.all() else f" in the {int(known.sum()):,} tensors where this was measured"
    told = f"An isotropic update of the same norm would change {percent(null / total, 2)}{where}"
    if abs(count - null) <= max(CLEAR * deviation, SMALL * null):
        text = f"{told}: the run changed <b>about as many</b>, so its sparsity shows the update's size and bf16's grid."
        return Finding(ISOTROPIC, "about as many", text)
    more = "more" if count > null else "fewer"
    by = f"{percent(abs(count / null - 1), 1)} {more}" if null else "some"
    return Finding(ISOTROPIC, more, f"{told}: the run changed <b>{by}</b>.")


def energy(rows: Frame) -> Finding | None:
    """Principal directions, more or less than isotropic, counted over matrices by their z-scores."""
    if not rows.has("energy_both"):
        return None
    share, null = median(rows.numbers("energy_both")), median(rows.numbers("energy_both_isotropic"))
    told = (
        f"Median share of the update's energy in the principal subspaces of both sides: {percent(share)}; an isotropic "
        f"update has {percent(null)}"
    )
    z = rows.numbers("energy_both_z")
    z = z[np.isfinite(z)]
    if not len(z):
        return Finding(ENERGY, "no z-score, so no verdict", f"{told}. No z-score was measured, so this is no verdict.")
    above, below = int((z >= CLEAR).sum()), int((z <= -CLEAR).sum())
    counts = f"(|z| of at least {CLEAR:g}: above in {above:,} of {len(z):,} matrices, below in {below:,})"
    for side, times in (("more", above), ("less", below)):
        if times > MATCH * len(z):
            text = f"{told}: the update lies in principal directions <b>{side}</b> than isotropic {counts}."
            return Finding(ENERGY, f"{side} than isotropic", text)
    return Finding(ENERGY, "no clear difference", f"{told}: <b>no clear difference</b> over matrices {counts}.")


def clear(times: int, of: int) -> bool:
    """Whether so many matrices on one side are most of them, and more than a fair coin brings."""
    return times > MATCH * of and times - of / 2 > CLEAR * np.sqrt(of) / 2


def angles(rows: Frame) -> Finding | None:
    if not rows.has("resolution_degrees"):
        return None
    seen = np.fmax(rows.numbers("left_degrees"), rows.numbers("right_degrees"))
    resolution = f"{float(np.nanmax(rows.numbers('resolution_degrees'))):.3g}\N{DEGREE SIGN} or finer"
    resolved, everything = int(np.isfinite(seen).sum()), len(seen)
    counts = f"{resolved:,} of {everything:,} matrices are above it"
    if 2 * resolved <= everything:
        return Finding(
            ANGLES,
            "below resolution",
            f"Subspaces: in most matrices the largest principal angle is <b>below resolution</b> ({resolution}; "
            f"{counts}), so nothing is said about rotation.",
        )
    middle = float(np.median(np.where(np.isfinite(seen), seen, -np.inf)))
    told = (
        f"Subspaces: the largest principal angle is {middle:.2f}\N{DEGREE SIGN} (median; resolution {resolution}, "
        f"{counts})"
    )
    null = np.fmax(rows.numbers("left_degrees_isotropic"), rows.numbers("right_degrees_isotropic"))
    both = np.isfinite(seen) & np.isfinite(null)
    if not both.any():
        text = f"{told}; the angle of an isotropic update was not measured, so it is neither large nor small."
        return Finding(ANGLES, "that null was not measured", text)
    less, compared = int((seen[both] < null[both]).sum()), int(both.sum())
    verdict = "no clear difference"
    if clear(max(less, compared - less), compared):
        verdict = "smaller" if 2 * less > compared else "larger"
    return Finding(
        ANGLES,
        verdict,
        f"{told}; an isotropic update of the same norm would give about {median(null[both]):.2f}\N{DEGREE SIGN}: "
        f"<b>{verdict}</b> (smaller in {less:,} of {compared:,} matrices).",
    )


def spectrum(rows: Frame, columns: Shift) -> Finding | None:
    if not rows.has(columns.observed):
        return None
    nss, error, null = (rows.numbers(name) for name in columns[:3])
    lost, known = int((nss <= np.nan_to_num(error)).sum()), int(np.isfinite(nss).sum())
    if 2 * lost >= known:
        text = (
            f"Spectrum: the shift is <b>below its error</b> in {lost:,} of {known:,} matrices; nothing is said of it."
        )
        return Finding(SPECTRUM, "below its error", text)
    told = f"Spectrum: it shifted by {median(nss):.2e} of its norm ({columns.title}, median)"
    both = np.isfinite(nss) & np.isfinite(null) & (null > 0)
    if not both.any():
        return Finding(SPECTRUM, "that null was not measured", f"{told}; no isotropic value beside it.")
    more, compared = int((nss[both] > null[both]).sum()), int(both.sum())
    ratio = float(np.median(nss[both] / null[both]))
    verdict = "no clear difference"
    if clear(max(more, compared - more), compared):
        verdict = "larger" if 2 * more > compared else "smaller"
    return Finding(
        SPECTRUM,
        verdict,
        f"{told}, {ratio:.2f} times what an isotropic update of the same norm gives: <b>{verdict}</b> (larger in "
        f"{more:,} of {compared:,} matrices).",
    )


def principal(rows: Frame) -> Finding | None:
    """Changed weights among principal weights: beyond what their exponents alone bring?"""
    if not rows.has("principal_changed"):
        return None
    total, inside, null, variance = (
        float(rows.numbers(name).sum())
        for name in ("changed", "principal_changed", "principal_expected_exponent", "principal_variance_exponent")
    )
    if not total > 0 or not np.isfinite(null):
        return None
    z = (inside - null) / np.sqrt(variance) if variance > 0 else 0.0
    told = (
        f"Principal weights hold {percent(inside / total, 2)} of the changed weights; their exponents alone bring "
        f"{percent(null / total, 2)} (z&nbsp;=&nbsp;{z:+.1f})"
    )
    if abs(z) < CLEAR:
        text = f"{told}: <b>not to be told from that</b>; z is small."
        return Finding(PRINCIPAL, "no difference, z is small", text)
    by = percent(abs(inside - null) / total, 2)
    side, verdict = ("prefer", "more") if z > 0 else ("avoid", "fewer")
    text = f"{told}: changes <b>{side}</b> them beyond that null, by {by} of all changes."
    text += " z grows with the number of weights: judge by the size."
    return Finding(PRINCIPAL, f"{verdict}, by {by} of all changes", text)
