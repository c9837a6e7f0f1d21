"""Masks of an isotropic update: Gaussian noise added to a bf16 weight, and the sum rounded to nearest bf16.

A weight visibly changes when the noise leaves the interval that rounds to it, about half an ULP to either side, so all
that matters of W0 is its histogram of exponents. Within an exponent the 128 mantissas are taken to be equally frequent.
Source: arXiv 2511.08567, sections 2.2 and 3.6; the expectations are Gaussian tails.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from .agreement import Agreement

FIELDS = 256
MANTISSAS = 128
# distance to the next larger bf16 by exponent field; subnormals have the spacing of field 1
UP = np.ldexp(1.0, np.maximum(np.arange(FIELDS), 1) - 134)
# lattice steps summed one by one; further ones weigh less than 1e-15 where the sum is used
STEPS = np.arange(1, 10, dtype=np.float64)[:, None, None]


def tails(x: np.ndarray) -> np.ndarray:
    """P(z > x) of a standard normal, fp64."""
    return 0.5 * torch.special.erfc(torch.from_numpy(x / math.sqrt(2))).numpy()


def over_mantissas(regular: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Mean over the 128 mantissas of two-sided values, of which mantissa 0 has half from the binade below."""
    return ((MANTISSAS - 0.5) * regular + 0.5 * below) / MANTISSAS


def rounding_visibility(sigma: float) -> np.ndarray:
    """Probability that noise N(0, sigma^2) visibly changes a bf16 weight, float64 ``[256]`` by its exponent field.

    ``sigma`` is in the weight's unit. Exact for equally frequent mantissas; 0 for field 255 (Inf, NaN) and sigma = 0.
    """
    if sigma == 0:
        return np.zeros(FIELDS)
    leave = 2 * tails(UP / (2 * sigma))
    found = over_mantissas(leave, np.concatenate([leave[:1], leave[:-1]]))
    # Inf and NaN stay what they are
    found[-1] = 0.0
    return found


def rounding_energy(sigma: float) -> np.ndarray:
    """E[(bf16(w + d) - w)^2] of noise d ~ N(0, sigma^2), float64 ``[256]`` by the exponent field of w.

    Up to one ULP the sum over lattice points on either side, beyond it sigma^2 + ULP^2 / 12, which there is the same to
    1e-8. The lattice is continued with the weight's own spacing (below mantissa 0, half of it); other binades have
    others: off by less than 1e-3 (largest near one ULP). Overflow to Inf is not modelled; field 255 is 0.
    """
    found = np.zeros(FIELDS)
    if sigma > 0:
        found[:-1] = energy_of(np.arange(FIELDS - 1), sigma)
    return found


def rounding_kurtosis(sigma: float) -> np.ndarray:
    """E[(bf16(w + d) - w)^4] of noise d ~ N(0, sigma^2), float64 ``[256]``; as :func:`rounding_energy`."""
    found = np.zeros(FIELDS)
    if sigma > 0:
        step = np.stack([UP[:-1], UP[np.maximum(np.arange(FIELDS - 1) - 1, 0)]])
        ratio = step / sigma
        # in units of sigma, or powers of small spacings would vanish: j^4 - (j - 1)^4 = 4 j^3 - 6 j^2 + 4 j - 1
        odd = 4 * STEPS**3 - 6 * STEPS**2 + 4 * STEPS - 1
        near = 2 * (odd * tails((STEPS - 0.5) * np.maximum(ratio, 1.0))).sum(0)
        with np.errstate(over="ignore", invalid="ignore"):
            lattice = np.where(near > 0, near * ratio**4, 0.0)
        found[:-1] = over_mantissas(*np.where(ratio > 1, lattice, 3 + ratio**2 / 2 + ratio**4 / 80)) * sigma**4
    return found


def energy_of(fields: np.ndarray, sigma: float) -> np.ndarray:
    """:func:`rounding_energy` of these exponent fields only."""
    # above, and below mantissa 0, where the next smaller number lies a binade down
    step = np.stack([UP[fields], UP[np.maximum(fields - 1, 0)]])
    ratio = step / sigma
    # squares of an odd lattice by Abel summation: j^2 - (j - 1)^2 = 2 j - 1
    near = 2 * ((2 * STEPS - 1) * tails((STEPS - 0.5) * np.maximum(ratio, 1.0))).sum(0)
    return over_mantissas(*np.where(ratio > 1, near * step * step, sigma * sigma + step * step / 12))


def histogram(counts: ArrayLike) -> np.ndarray:
    found = np.asarray(counts, dtype=np.float64)
    if found.shape != (FIELDS,):
        raise ValueError(f"a histogram of exponents has shape [{FIELDS}], got {list(found.shape)}")
    return found


def isotropic_sigma(exponents: ArrayLike, update_norm: float) -> float:
    """Standard deviation of the noise whose update, once rounded, has an expected squared norm of update_norm ** 2.

    Few changed coordinates say little: on Gaussian weights its relative error is about 0.5 / sqrt(changed).

    Args:
        exponents: int ``[256]``, coordinates of W0 by exponent field.
        update_norm: ||W+ - W0||_F as stored, after rounding.

    Returns:
        0 for a norm of 0; NaN for a norm that is NaN or Inf, or where no coordinate is finite.
    """
    counts = histogram(exponents)
    if update_norm == 0:
        return 0.0
    used = np.flatnonzero(counts[:-1])
    # no update of bf16 weights is larger
    if not update_norm < 1e100 or not len(used):
        return math.nan
    target, weights = float(update_norm) ** 2, counts[used]

    def excess(x: float) -> float:
        energy = float(energy_of(used, 2.0**x) @ weights)
        return math.log(energy / target) if energy > 0 else -math.inf

    # below nothing leaves its interval; above the energy exceeds sigma^2
    low, high = -145.0, math.log2(max(float(UP[used[-1]]), update_norm)) + 1
    below, above = -math.inf, excess(high)
    # regula falsi in logarithms, halving the weight of an end that stays (Illinois); bisection where one end is nothing
    stayed = 0
    while high - low > 1e-11:
        usable = math.isfinite(below) and below < 0 < above
        middle = high - above * (high - low) / (above - below) if usable else 0.5 * (low + high)
        if not low < middle < high:
            break
        now = excess(middle)
        if now == 0:
            return 2.0**middle
        if now < 0:
            low, below, above = middle, now, above / 2 if stayed > 0 else above
            stayed = 1
        else:
            high, above, below = middle, now, below / 2 if stayed < 0 else below
            stayed = -1
        if abs(now) < 1e-12:
            break
    return 2.0**middle if math.isfinite(below) else 2.0**high


def isotropic_changed(exponents: ArrayLike, update_norm: float) -> np.ndarray:
    """Expected number of visibly changed coordinates by exponent, float64 ``[256]``.

    Arguments as :func:`isotropic_sigma`. It may take the place of a mask's counts by exponent in
    :func:`stratified_intersection`.
    """
    counts = histogram(exponents)
    return counts * rounding_visibility(isotropic_sigma(counts, update_norm))


def isotropic_agreement(exponents: ArrayLike, norm_a: float, norm_b: float) -> Agreement:
    """|A & B| and |A | B| expected of two independent isotropic updates of one weight.

    Args:
        exponents: int ``[256]``, coordinates of W0 by exponent field.
        norm_a, norm_b: ||W+ - W0||_F of either update as stored.
    """
    counts = histogram(exponents)
    p, q = (rounding_visibility(isotropic_sigma(counts, norm)) for norm in (norm_a, norm_b))
    return Agreement(float(counts @ (p * q)), float(counts @ (p + q - p * q)))


class Inside(NamedTuple):
    """Changed coordinates expected inside a mask and anywhere."""

    inside: float
    changed: float

    @property
    def overlap(self) -> float:
        """The share of the changed coordinates that lies inside; NaN where none is expected."""
        return self.inside / self.changed if self.changed > 0 else math.nan


def isotropic_inside(exponents: ArrayLike, mask_exponents: ArrayLike, update_norm: float) -> Inside:
    """How much of an isotropic update falls into a mask that W0 decides, such as the principal or low-magnitude one.

    Args:
        exponents: int ``[256]``, coordinates of W0 by exponent field.
        mask_exponents: int ``[256]``, those of them that lie in the mask.
        update_norm: ||W+ - W0||_F as stored.
    """
    counts = histogram(exponents)
    visible = rounding_visibility(isotropic_sigma(counts, update_norm))
    return Inside(float(histogram(mask_exponents) @ visible), float(counts @ visible))
