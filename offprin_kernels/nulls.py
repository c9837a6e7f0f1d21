"""Null models: what agreement two update masks would show if geometry played no part.

All take integer counts, so that nothing is re-read. Source: arXiv 2511.08567, section 2.2; the stratified variance is
that of the Mantel-Haenszel test (Mantel and Haenszel 1959).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def bernoulli_jaccard(p: float, q: float) -> float:
    """Expected Jaccard index of independent uniform masks of densities p and q: pq / (p + q - pq); 1 if both are 0."""
    union = p + q - p * q
    return p * q / union if union else 1.0


@dataclass(frozen=True)
class IntersectionNull:
    """|A & B| when both masks are shuffled independently within strata, their counts there kept."""

    mean: float
    variance: float

    def jaccard(self, changed_a: int, changed_b: int) -> float:
        """Jaccard index at the mean; by exponent, sum(h p q) / sum(h (p + q - p q)). 1 if both are empty."""
        union = changed_a + changed_b - self.mean
        return self.mean / union if union > 0 else 1.0

    def z_score(self, observed: int) -> float:
        """Standard deviations between the observation and the null's mean; 0 where the null leaves no freedom."""
        return (observed - self.mean) / math.sqrt(self.variance) if self.variance > 0 else 0.0


def stratified_intersection(sizes: ArrayLike, a: ArrayLike, b: ArrayLike) -> IntersectionNull:
    """Mean and variance of |A & B| under independence within each stratum, e.g. within each exponent of W0.

    Args:
        sizes: int ``[strata]``, coordinates in each stratum.
        a, b: int ``[strata]``, coordinates of either mask in each stratum.

    Returns:
        The sums over strata of the hypergeometric mean and variance. Strata of several tensors may be joined, or their
        means and variances added.
    """
    sizes, a, b = (np.asarray(x, dtype=np.float64) for x in (sizes, a, b))
    used = sizes > 0
    n, a, b = sizes[used], a[used], b[used]
    mean = a * b / n
    variance = np.where(n > 1, mean * (n - a) / n * (n - b) / np.maximum(n - 1, 1), 0.0)
    return IntersectionNull(float(mean.sum()), float(variance.sum()))


def independent_votes(sizes: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """Expected number of coordinates set in exactly j of R masks that are independent within each stratum.

    Args:
        sizes: int ``[strata]``, coordinates in each stratum.
        counts: int ``[R, strata]``, coordinates of each mask in each stratum.

    Returns:
        float64 ``[R + 1]``, summing to ``sum(sizes)``: the null of the consensus histogram.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    counts = np.asarray(counts, dtype=np.float64)
    densities = np.divide(counts, sizes, out=np.zeros_like(counts), where=sizes > 0)
    # shares[j]: probability of j votes so far, by stratum (Poisson binomial, one mask after the other)
    shares = np.zeros((len(densities) + 1, len(sizes)))
    shares[0] = 1.0
    for density in densities:
        shares[1:] = shares[1:] * (1 - density) + shares[:-1] * density
        shares[0] *= 1 - density
    return shares @ sizes
