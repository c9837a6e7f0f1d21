"""Energy shares and principal angles of an isotropic update: a Gaussian matrix of the same norm."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch

# singular values on either side of the k-th whose mixing is taken exactly
WINDOW = 32
# tangents are cut here, at 89.994 degrees: larger ones would drown the small ones in their common Gram matrix
STEEPEST = 1e4


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


def isotropic_angles(
    values: torch.Tensor, m: int, n: int, k: int, update_norm: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal angles by which one random Gaussian update turns the top-k singular subspaces of a weight.

    Args:
        values: fp64 ``[p]``, p = min(m, n), all singular values of W0, descending, on any device.
        m, n: shape of W0.
        k: dimension of the subspaces.
        update_norm: root mean square of the update's Frobenius norm, in the unit of the values.
        seed: of the draw.

    Returns:
        Left and right angles in degrees, fp64 ``[k]`` on the CPU, descending. 90 for each direction that ties between
        the k-th singular value and the next leave undefined; 0 for a zero update; NaN where norm or values are not
        finite.

    Raises ValueError for values of another length and k outside 1..p.

    In the singular basis a Gaussian update is Gaussian as well and W0 is diagonal, so that the 2 (p - k) k numbers that
    couple the subspaces to the rest are all that is drawn. See :func:`couplings` for what is neglected: the angles are
    those of an SVD within a few percent while the largest stays below some 10 degrees; beyond, up to a third too small.
    """
    p = min(m, n)
    s = torch.as_tensor(values).detach().cpu().double().numpy()
    if s.shape != (p,):
        raise ValueError(f"a {m} x {n} weight has {p} singular values, got shape {list(s.shape)}")
    if not 1 <= k <= p:
        raise ValueError(f"k must lie between 1 and min(m, n) = {p}, got {k}")
    if not (math.isfinite(update_norm) and np.isfinite(s).all()):
        return torch.full((k,), math.nan).double(), torch.full((k,), math.nan).double()
    if update_norm == 0:
        return torch.zeros(k).double(), torch.zeros(k).double()
    sigma, s = (update_norm / math.sqrt(m * n) / s[0], s / s[0]) if s[0] > 0 else (1.0, s)
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, p - k, k), dtype=np.float32)
    w = min(k, p - k, WINDOW)
    core = rng.standard_normal((2 * w, 2 * w))
    core[w:, :w], core[:w, w:] = a[:w, k - w :], b[:w, k - w :].T
    found = []
    for coupling, outside in zip(couplings(s, sigma, a, b, core), (m - p, n - p), strict=True):
        rows = torch.from_numpy(coupling).double()
        gram = rows.mT @ rows
        if outside:
            scale = np.divide(sigma, s[:k], out=np.zeros(k), where=s[:k] > 0)
            beyond = torch.from_numpy(gaussian_triangle(rng, outside, k) * np.minimum(scale, STEEPEST))
            gram += beyond.mT @ beyond
        angles = torch.rad2deg(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().atan()).flip(0)
        # pairs without a gap have no coupling; each leaves one direction of the subspace to chance
        tied = min(int((s[:k] == s[k - 1]).sum()), int((s[k:] == s[k - 1]).sum()) + (0 if s[k - 1] > 0 else outside))
        found.append(torch.cat([torch.full((tied,), 90.0).double(), angles[: k - tied]]))
    return found[0], found[1]


def couplings(
    s: np.ndarray, sigma: float, a: np.ndarray, b: np.ndarray, core: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How much of each direction outside the top k an update mixes into those inside: the tangents of the rotation.

    Args:
        s: fp64 ``[p]``, singular values of the base, descending, the largest about 1.
        sigma: scale of the update D; with u, v the singular vectors of the base, and i <= k < j:
        a: fp32 ``[p - k, k]``, u_j^T D v_i / sigma.
        b: fp32 ``[p - k, k]``, u_i^T D v_j / sigma.
        core: fp64 ``[2 w, 2 w]``, u_i^T D v_j / sigma of the w vectors on either side of the k-th.

    Returns:
        P and Q, fp32 ``[p - k, k]``: to first order the top-k subspaces become the spans of u_i + sum_j P_ji u_j and
        v_i + sum_j Q_ji v_j, which solve s_i P = D_ji + s_j Q and s_i Q = D_ij + s_j P (Stewart and Sun, Matrix
        Perturbation Theory, 1990, chapter V). Among the w vectors on either side, whose small gaps decide the largest
        angles, the mixing is that of an SVD of the core. Pairs without a gap get 0.
    """
    k, w = a.shape[1], len(core) // 2
    top, rest = s[:k], s[k:, None]
    gaps = (top - rest) * (top + rest)
    per_gap = np.divide(sigma, gaps, out=np.zeros_like(gaps), where=gaps > 0)
    own, other = (np.minimum(per_gap * x, STEEPEST).astype(np.float32) for x in (top, rest))
    left, right = own * a + other * b, other * a + own * b
    if w and gaps[0, -1] > 0:
        u, _, vh = torch.linalg.svd(torch.from_numpy(np.diag(s[k - w : k + w]) + sigma * core))
        for coupling, vectors in ((left, u), (right, vh.mT)):
            inside, outside = vectors[:w, :w], vectors[w:, :w]
            exact = torch.linalg.lstsq(inside.mT, outside.mT, driver="gelsd").solution.mT
            coupling[:w, k - w :] = exact.clamp(-STEEPEST, STEEPEST).numpy()
    return left, right


def gaussian_triangle(rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    """``[min(rows, k), k]`` with the Gram matrix of ``rows`` independent Gaussian rows (Bartlett 1933), fp64."""
    if rows <= k:
        return rng.standard_normal((rows, k))
    triangle = np.triu(rng.standard_normal((k, k)), 1)
    np.fill_diagonal(triangle, np.sqrt(rng.chisquare(rows - np.arange(k))))
    return triangle
