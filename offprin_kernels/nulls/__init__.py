"""Null models: what update masks, angles and energies would show if geometry played no part.

* :mod:`.agreement`: masks that keep their counts, by exponent or by row and column.
* :mod:`.rounding`: masks of a Gaussian update of the same norm, seen through bf16 rounding.
* :mod:`.spectral`: angles and energy shares of a Gaussian update of the same norm.
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
    rounding_visibility,
)
from .spectral import ShareNull, energy_null, isotropic_angles

__all__ = [
    "Agreement",
    "Inside",
    "IntersectionNull",
    "MarginNull",
    "ShareNull",
    "bernoulli_jaccard",
    "energy_null",
    "independent_votes",
    "isotropic_agreement",
    "isotropic_angles",
    "isotropic_changed",
    "isotropic_inside",
    "isotropic_sigma",
    "margin_null",
    "rounding_energy",
    "rounding_visibility",
    "stratified_intersection",
]
