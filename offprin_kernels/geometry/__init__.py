"""Spectral geometry of an update: angles between principal subspaces, spectra and their shift, energies, bounds.

Every number that comes from an iteration carries its resolution, and every observation its null or its bound.
Source: arXiv 2511.08567, sections 3.2 and 4.1.
"""

from .angles import Angles, angles_between, principal_angles, resolved
from .spectra import (
    BaseSpectrum,
    Shift,
    Spectrum,
    TopShift,
    base_spectrum,
    estimated_values,
    normalized_spectral_shift,
    spectrum,
    spectrum_and_factors,
    stable_rank,
    top_shift,
)
from .updates import Bounds, Energy, Sketch, bounds, update_energy, update_sketch

__all__ = [
    "Angles",
    "BaseSpectrum",
    "Bounds",
    "Energy",
    "Shift",
    "Sketch",
    "Spectrum",
    "TopShift",
    "angles_between",
    "base_spectrum",
    "bounds",
    "estimated_values",
    "normalized_spectral_shift",
    "principal_angles",
    "resolved",
    "spectrum",
    "spectrum_and_factors",
    "stable_rank",
    "top_shift",
    "update_energy",
    "update_sketch",
]
