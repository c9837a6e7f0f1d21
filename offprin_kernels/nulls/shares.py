"""Energy shares of an isotropic update in fixed subspaces: a Gaussian matrix, as it is or added and rounded to bf16."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch

from .rounding import rounding_energy, rounding_kurtosis

SIDES: tuple[Literal["left"], Literal["right"], Literal["both"]] = ("left", "right", "both")
# weights whose exponents are looked up at once
AT_ONCE = 1 << 20


class ShareNull(NamedTuple):
    """Mean and variance of a share of energy."""

    mean: float
    variance: float

    def z_score(self, observed: float) -> float:
        """Standard deviations between the observation and the null's mean; 0 where the null leaves no freedom."""
        return (observed - self.mean) / math.sqrt(self.variance) if self.variance > 0 else 0.0


def energy_null(m: int, n: int, k: int, side: Literal["left", "right", "both"]) -> ShareNull:
    """Share of a Gaussian update's squared norm that lies in fixed k-dimensional subspaces; exact.

    Args:
        m, n: shape of the update, before rounding: a sparse one has fewer coordinates, and its share more variance.
        k: dimension of the subspaces, at most m or n.
        side: ``left`` (||U^T D||^2), ``right`` (||D V||^2) or ``both`` (||U^T D V||^2).

    ``d`` of ``m n`` independent coordinates hold a Beta(d / 2, (m n - d) / 2) share of the energy. Source: arXiv
    2511.08567, section 4.1, for the shares; their law is that of a ratio of chi-squares.
    """
    dimensions = {"left": k * n, "right": k * m, "both": k * k}
    if side not in dimensions:
        raise ValueError(f"side must be left, right or both, got {side!r}")
    if not 0 < k <= {"left": m, "right": n, "both": min(m, n)}[side]:
        raise ValueError(f"k must lie between 1 and the dimension of the {side} side of {m} x {n}, got {k}")
    mean = dimensions[side] / (m * n)
    return ShareNull(mean, mean * (1 - mean) / (m * n / 2 + 1))


def rounded_energy_nulls(weight: torch.Tensor, u: torch.Tensor, vh: torch.Tensor, sigma: float) -> dict[str, ShareNull]:
    """Shares of the energy of bf16(W0 + D) - W0 in principal subspaces, D Gaussian: mean and variance by side.

    Rounding keeps more of an update where weights are small. Where small weights gather in rows or columns, what is
    left of an isotropic update is no longer isotropic: its shares differ from those of :func:`energy_null` although
    geometry plays no part.

    Args:
        weight: bf16 ``[m, n]``, W0; finite.
        u: fp32 ``[m, k]``, vh: fp32 ``[k, n]``: orthonormal bases of the subspaces.
        sigma: standard deviation of D, from :func:`isotropic_sigma`.

    Returns:
        ``left``, ``right``, ``both``: ShareNull; NaN where sigma is 0 or nothing is expected to be left.

    Coordinates stay independent, each with the second and fourth moments that its exponent gives it. With P and Q the
    projections on the subspaces, E ||P D Q||^2 = sum_ij P_ii Q_jj v_ij. The variance is that of the ratio to
    ||D||^2: exact for the squares; for products of two coordinates v_ij is taken as (row sum) (column sum) / total.
    """
    if weight.dtype != torch.bfloat16:
        raise TypeError(f"the null of rounding is for bf16 weights, got {weight.dtype}")
    scale = sigma if sigma > 0 else 1.0
    moments = np.stack([rounding_energy(sigma) / scale**2, rounding_kurtosis(sigma) / scale**4])
    moments[1] -= moments[0] ** 2
    down, across = u.square().sum(1), vh.square().sum(0)
    columns = torch.stack([torch.ones_like(across), across, across.square()], 1)
    second, fourth = (torch.zeros(3, 3, dtype=torch.float64) for _ in range(2))
    rows, cols = torch.zeros(len(down), device=u.device), torch.zeros(len(across), device=u.device)
    tables = torch.from_numpy(moments).float().to(weight.device)
    step = max(1, AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step]
        fields = ((part.contiguous().view(torch.int16).int() >> 7) & 0xFF).flatten()
        left = torch.stack([torch.ones_like(down[start : start + step]), down[start : start + step],
                            down[start : start + step].square()])  # fmt: skip
        v, w = (table.index_select(0, fields).view(part.shape) for table in tables)
        # [1, P_ii, P_ii^2] x [1, Q_jj, Q_jj^2] moments of v and of the variance of squares
        by_row = v @ columns
        rows[start : start + step] = by_row[:, 0]
        cols += v.sum(0)
        second += (left.double() @ by_row.double()).cpu()
        fourth += (left.double() @ (w @ columns).double()).cpu()
    total = float(second[0, 0])
    if not total > 0:
        return {side: ShareNull(math.nan, math.nan) for side in SIDES}
    # sums over pairs of different coordinates of P^2 Q^2 v v, with v separated
    all_left, all_right = squared(u.mT @ (u * rows[:, None])), squared((vh * cols) @ vh.mT)
    same_left, same_right = squared(down * rows), squared(across * cols)
    found = {}
    for side, (i, j), pairs in (
        ("left", (1, 0), (all_left - same_left) * squared(cols)),
        ("right", (0, 1), (all_right - same_right) * squared(rows)),
        ("both", (1, 1), all_left * all_right - same_left * same_right),
    ):
        mean = float(second[i, j]) / total
        squares = float(fourth[2 * i, 2 * j] - 2 * mean * fourth[i, j] + mean**2 * fourth[0, 0])
        found[side] = ShareNull(mean, (squares + 2 * pairs / total**2) / total**2)
    return found


def squared(x: torch.Tensor) -> float:
    """Squared Frobenius norm, in fp64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
