"""Agreement of masks whose counts are kept, by stratum or by row and column, and whose coordinates are shuffled.

All take integer counts, so that nothing is re-read. Source: arXiv 2511.08567, section 2.2; the stratified variance is
that of the Mantel-Haenszel test (Mantel and Haenszel 1959).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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
    """Mean and variance of |A & B| under independence within each stratum, e.g. each exponent of W0, or each tensor.

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


class Agreement(NamedTuple):
    """|A & B| and |A | B| expected of two masks."""

    intersection: float
    union: float

    @property
    def jaccard(self) -> float:
        """Their ratio. 1 if both masks are empty."""
        return self.intersection / self.union if self.union > 0 else 1.0


# of independent masks that keep their row and column densities
MarginNull = Agreement


def margin_null(rows_a: ArrayLike, columns_a: ArrayLike, rows_b: ArrayLike, columns_b: ArrayLike) -> MarginNull:
    """Agreement that row and column densities alone bring: coordinate (i, j) is set with p_i p_j / p, at most 1.

    Args:
        rows_a, rows_b: int ``[m]``, set coordinates of each row of either mask.
        columns_a, columns_b: int ``[n]``, set coordinates of each column.

    A vector is its own margin: there the null is the observation.
    """
    r_a, c_a, r_b, c_b = (np.asarray(x, dtype=np.float64) for x in (rows_a, columns_a, rows_b, columns_b))
    total_a, total_b = r_a.sum(), r_b.sum()
    if not total_a or not total_b:
        return MarginNull(0.0, float(total_a + total_b))
    # Below 1 probabilities are products, and their sum a product of sums; only these rows and columns may exceed it.
    i = (r_a * c_a.max() > total_a) | (r_b * c_b.max() > total_b)
    j = (c_a * r_a.max() > total_a) | (c_b * r_b.max() > total_b)
    r_a, r_b = r_a / total_a, r_b / total_b
    factors = ((r_a, c_a), (r_b, c_b), (r_a * r_b, c_a * c_b))
    a, b, both = (u[~i].sum() * v.sum() + u[i].sum() * v[~j].sum() for u, v in factors)
    r_a, r_b, c_a, c_b = r_a[i], r_b[i], c_a[j], c_b[j]
    step = max(1, (1 << 20) // max(1, len(c_a)))
    for start in range(0, len(r_a), step):
        p_a = np.minimum(1.0, r_a[start : start + step, None] * c_a)
        p_b = np.minimum(1.0, r_b[start : start + step, None] * c_b)
        a, b, both = a + p_a.sum(), b + p_b.sum(), both + (p_a * p_b).sum()
    return MarginNull(float(both), float(a + b - both))


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
