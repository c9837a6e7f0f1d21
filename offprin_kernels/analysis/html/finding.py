"""What a finding is, and from where on a difference is called one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLEAR = 3.0  # standard deviations from which a difference is more than chance
SMALL = 0.01  # relative difference of shares below which nothing is said: nulls are estimates themselves
SMALL_JACCARD = 0.005  # the same for Jaccard indices, absolute
SMALL_SHIFT = 0.05  # the same for spectral shifts, relative
MATCH = 2 / 3  # share of matrices above which a difference is called clear
UNRESOLVED = "no difference that the null can resolve"

# What a finding is about, as the short summary calls it.
CHANGED = "Changed"
ISOTROPIC = "Changed weights, against an isotropic update of the same norm"
ENERGY = "Energy of the update in principal directions, against a rounded isotropic update"
ANGLES = "Largest principal angles, against an isotropic update"
SPECTRUM = "Shift of the spectrum, against an isotropic update"
PRINCIPAL = "Changes among principal weights, against what exponents alone bring"


@dataclass(frozen=True)
class Finding:
    """``verdict`` is a few words, which runs may share; ``text`` is a whole sentence of HTML with the numbers.

    ``value`` orders runs of which each has its own verdict.
    """

    topic: str
    verdict: str
    text: str
    value: float = float("nan")


def clear(times: int, of: int) -> bool:
    """Whether so many matrices on one side are most of them, and more than a fair coin brings."""
    return times > MATCH * of and times - of / 2 > CLEAR * np.sqrt(of) / 2
