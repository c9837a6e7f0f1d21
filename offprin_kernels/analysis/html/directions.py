"""Findings on the directions of an update: energies, angles, spectra, principal weights; each against its null."""

from __future__ import annotations

import numpy as np

from ..charts.angles import NULL_HOLDS
from ..charts.energy import median
from ..charts.spectra import against_isotropic
from ..schema import Shift
from ..tables import Frame
from ..text import percent
from .finding import (
    ANGLES,
    CLEAR,
    ENERGY,
    MATCH,
    PRINCIPAL,
    SMALL,
    SMALL_SHIFT,
    SPECTRUM,
    UNRESOLVED,
    Finding,
    clear,
)

DEGREE = "\N{DEGREE SIGN}"


def energy(rows: Frame) -> Finding | None:
    """Principal directions, more or less than a rounded isotropic update, counted over matrices by their z-scores."""
    if not rows.has("energy_both"):
        return None
    share, null, z = (rows.numbers(f"energy_both{end}") for end in ("", "_rounded", "_z"))
    told = f"Median share of the update's energy in the principal subspaces of both sides: {percent(median(share))}"
    shape = f"its shape alone gives {percent(median(rows.numbers('energy_both_isotropic')))}"
    known = np.isfinite(share) & np.isfinite(null) & np.isfinite(z) & (null > 0)
    if not known.any():
        text = f"{told} ({shape}). What an isotropic update has after rounding to bf16 is not known here: no verdict."
        return Finding(ENERGY, "no rounded null, so no verdict", text)
    share, null, z = (values[known] for values in (share, null, z))
    apart = np.abs(share / null - 1) >= SMALL
    above, below, of = int(((z >= CLEAR) & apart).sum()), int(((z <= -CLEAR) & apart).sum()), len(z)
    told = f"{told}; an isotropic update rounded to bf16 has {percent(median(null))} ({shape})"
    counts = (
        f"(above in {above:,} of {of:,} matrices, below in {below:,}, by |z| of at least {CLEAR:g} and "
        f"{percent(SMALL, 0)} of the share)"
    )
    for side, times in (("more", above), ("less", below)):
        if times > MATCH * of:
            text = f"{told}: the update lies in principal directions <b>{side}</b> than that {counts}."
            return Finding(ENERGY, f"{side} than isotropic", text)
    verdict = "no clear difference" if above + below else UNRESOLVED
    return Finding(ENERGY, verdict, f"{told}: <b>{verdict}</b> {counts}.")


def angles(rows: Frame) -> Finding | None:
    """Largest angles against draws of an isotropic update: where in their band, and on which side of their median.

    An angle below resolution is smaller where the null is above the resolution, and undecided elsewhere.
    """
    if not rows.has("resolution_degrees"):
        return None
    seen, null, low, high = (larger(rows, end) for end in ("", "_isotropic", "_isotropic_low", "_isotropic_high"))
    resolution = rows.numbers("resolution_degrees")
    known, everything = np.isfinite(seen), len(seen)
    limits = f"{float(np.nanmax(resolution)):.3g}{DEGREE} or finer"
    counts = f"{int(known.sum()):,} of {everything:,} matrices are above it"
    middle = float(np.median(np.where(known, seen, -np.inf)))
    told = f"Subspaces: the largest principal angle is {middle:.2f}{DEGREE} (median; resolution {limits}, {counts})"
    if not np.isfinite(middle):
        told = (
            f"Subspaces: the largest principal angle is <b>below resolution</b> in most matrices ({limits}; {counts})"
        )
    if not np.isfinite(null).any():
        text = f"{told}; the angle of an isotropic update was not measured, so it is neither large nor small."
        return Finding(ANGLES, "that null was not measured", text)
    holds = np.isfinite(null) & (null <= NULL_HOLDS)
    beyond = int((null > NULL_HOLDS).sum())
    if 2 * beyond >= everything:
        text = (
            f"{told}; an isotropic update of the same norm turns subspaces by more than {NULL_HOLDS:g}{DEGREE} in "
            f"{beyond:,} of {everything:,} matrices, where its angle is not known well enough: <b>no verdict</b>."
        )
        return Finding(ANGLES, "no verdict: updates too large for the null", text)
    compared = holds & (known | (null > resolution))
    of = int(compared.sum())
    if not of:
        text = f"{told}; that of an isotropic update is so as well, so nothing is said about rotation."
        return Finding(ANGLES, "below resolution, as is the null", text)
    # an angle below resolution has no value, but is below a null above it
    value = np.where(known, seen, -np.inf)
    smaller, larger_ = int((value < null)[compared].sum()), int((value > null)[compared].sum())
    upper = np.where(known, seen, resolution)  # the most that an unresolved angle can be
    below, above = int((upper < low)[compared].sum()), int((value > high)[compared].sum())
    return verdict_of_angles(told, value[compared], null[compared], (smaller, larger_), (below, above), everything - of,
                             bool(np.isfinite(low * high)[compared].any()))  # fmt: skip


def verdict_of_angles(
    told: str, seen: np.ndarray, null: np.ndarray, sides: tuple[int, int], outside: tuple[int, int], undecided: int,
    banded: bool,
) -> Finding:  # fmt: skip
    of, verdict = len(seen), "no clear difference"
    smaller, larger_ = sides
    if clear(max(sides), of):
        side = 0 if smaller > larger_ else 1
        verdict = ("smaller", "larger")[side]
        if not banded:
            verdict += ", its scatter not measured"
        elif 2 * outside[side] <= of:
            verdict = f"slightly {verdict}, inside the scatter of most"
    middle, of_null = float(np.median(seen)), f"{float(np.median(null)):.2f}{DEGREE}"
    beside = (
        f"over the {of:,} matrices that can be compared, an isotropic update of the same norm gives about {of_null}"
    )
    if np.isfinite(middle):
        beside = f"{beside} where {middle:.2f}{DEGREE} is observed"
    band = (
        f"; below all draws in {outside[0]:,}, above all in {outside[1]:,}, among them in {of - sum(outside):,}"
        if banded
        else ""
    )
    left = f"; {undecided:,} matrices undecided" if undecided else ""
    text = f"{told}; {beside}: <b>{verdict}</b> (smaller than the median draw in {smaller:,}{band}{left})."
    return Finding(ANGLES, verdict, text)


def larger(rows: Frame, what: str) -> np.ndarray:
    """The larger of both sides."""
    return np.fmax(rows.numbers(f"left_degrees{what}"), rows.numbers(f"right_degrees{what}"))


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
    seen, ratio = against_isotropic(rows, columns)
    told = f"Spectrum: it shifted by {seen:.2e} of its norm ({columns.title}, median)"
    both = np.isfinite(nss) & np.isfinite(null) & (null > 0)
    if not both.any():
        return Finding(SPECTRUM, "that null was not measured", f"{told}; no isotropic value beside it.")
    ratios = nss[both] / null[both]
    more, less = int((ratios >= 1 + SMALL_SHIFT).sum()), int((ratios <= 1 - SMALL_SHIFT).sum())
    verdict = "no clear difference"
    if abs(ratio - 1) < SMALL_SHIFT:
        verdict = UNRESOLVED
    elif clear(max(more, less), len(ratios)):
        verdict = "larger" if more > less else "smaller"
    return Finding(
        SPECTRUM,
        verdict,
        f"{told}, {ratio:.2f} times what an isotropic update of the same norm gives: <b>{verdict}</b> (larger in "
        f"{more:,} of {len(ratios):,} matrices, smaller in {less:,}, by {percent(SMALL_SHIFT, 0)} or more).",
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
    if abs(z) < CLEAR or abs(inside - null) < SMALL * null:
        why = "z is small" if abs(z) < CLEAR else f"they differ by less than {percent(SMALL, 0)} of the share"
        return Finding(PRINCIPAL, UNRESOLVED, f"{told}: <b>{UNRESOLVED}</b>; {why}.")
    by = percent(abs(inside - null) / total, 2)
    side, verdict = ("prefer", "more") if z > 0 else ("avoid", "fewer")
    text = f"{told}: changes <b>{side}</b> them beyond that null, by {by} of all changes."
    text += " z grows with the number of weights: judge by the size."
    return Finding(PRINCIPAL, f"{verdict}, by {by} of all changes", text, (inside - null) / total)
