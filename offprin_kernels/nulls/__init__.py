"""Null models: what update masks, angles and energies would show if geometry played no part.

* :mod:`.agreement`: masks that keep their counts, by exponent or by row and column.
* :mod:`.rounding`: masks of a Gaussian update of the same norm, seen through bf16 rounding.
* :mod:`.shares`: its energy in principal subspaces, as it is and rounded.
* :mod:`.spectral`: the angles and the spectral shift that it causes.
"""

from .agreement import (
    Agreement,
    IntersectionNull,
    MarginNull,
    bernoulli_jaccard,
    independent_votes,
    margin_null,
    stratified_intersection,
)
from .rounding import (
    Inside,
    isotropic_agreement,
    isotropic_changed,
    isotropic_inside,
    isotropic_sigma,
    rounding_energy,
    rounding_kurtosis,
    rounding_visibility,
)
from .shares import SIDES, ShareNull, energy_null, rounded_energy_nulls
from .spectral import Band, isotropic_angles, isotropic_band, isotropic_shift

__all__ = [
    "Agreement",
    "Band",
    "Inside",
    "IntersectionNull",
    "MarginNull",
    "SIDES",
    "ShareNull",
    "bernoulli_jaccard",
    "energy_null",
    "independent_votes",
    "isotropic_agreement",
    "isotropic_angles",
    "isotropic_band",
    "isotropic_changed",
    "isotropic_inside",
    "isotropic_shift",
    "isotropic_sigma",
    "margin_null",
    "rounded_energy_nulls",
    "rounding_energy",
    "rounding_kurtosis",
    "rounding_visibility",
    "stratified_intersection",
]
