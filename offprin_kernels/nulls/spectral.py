"""Principal angles and spectral shift that an isotropic update causes: a Gaussian matrix of the same norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

# singular values on either side of the k-th whose mixing is taken exactly
WINDOW = 32
# tangents are cut here, at 89.994 degrees: larger ones would drown the small ones in their common Gram matrix
STEEPEST = 1e4


class Band(NamedTuple):
    """Angles of several draws, in degrees, fp64 ``[k]`` descending: median, smallest and largest of each."""

    median: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def isotropic_band(
    values: torch.Tensor, m: int, n: int, k: int, update_norm: float, *, draws: int = 5, seed: int = 0
) -> tuple[Band, Band]:
    """Left and right angles of several random Gaussian updates; the largest angle varies much from draw to draw.

    An observed angle of an isotropic update lies above all of d draws with probability 1 / (d + 1), and below likewise.
    Arguments and errors as :func:`isotropic_angles`; ``seed`` should differ from matrix to matrix.
    """
    found = [isotropic_angles(values, m, n, k, update_norm, seed=(seed, draw)) for draw in range(draws)]
    sides = [torch.stack(side) for side in zip(*found, strict=True)]
    left, right = (Band(side.quantile(0.5, dim=0), side.amin(0), side.amax(0)) for side in sides)
    return left, right


def isotropic_angles(
    values: torch.Tensor, m: int, n: int, k: int, update_norm: float, seed: int | tuple[int, ...] = 0
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


# Pairs of singular values looked at at once: few enough for the second-level cache.
PAIRS = 1 << 15
# how strongly close neighbours hold each other in place; fitted to simulations of flat and of falling spectra
CROWD = 0.75


def isotropic_shift(values: torch.Tensor, m: int, n: int, k: int, update_norm: float) -> torch.Tensor:
    """Root mean square of how far a Gaussian update moves each of the k largest singular values of a weight.

    Args:
        values: fp64 ``[p]``, p = min(m, n), all singular values of W0, descending.
        m, n: shape of W0.
        k: how many values, 1..p.
        update_norm: Frobenius norm of the update, in the unit of the values.

    Returns:
        sqrt(E (s_i(W0 + D) - s_i(W0))^2), fp64 ``[k]`` on the CPU. Its norm over that of the values is NSS.

    To second order: s_i moves by u_i^T D v_i, of variance sigma^2, and is pushed up by all others together, on average
    by sigma^2 (sum_j s_i / (s_i^2 - s_j^2) + |m - n| / (2 s_i)), sigma^2 = ||D||^2 / (m n). The first term alone gives
    ||D|| sqrt(k / (m n)); the second dominates once ||D|| / ||W0|| exceeds about 1 / sqrt(max(m, n)). Neighbours
    closer than sigma share their push (1 / gap becomes gap / (gap^2 + 2 sigma^2)) and hold each other in place. Within
    6 % of simulations up to ||D|| = 0.1 ||W0||. Source: Stewart, Perturbation theory for the singular value
    decomposition (1990), for the two terms.
    """
    s = torch.as_tensor(values).detach().cpu().double()
    variance = update_norm**2 / (m * n)
    if not variance:
        return torch.zeros(k, dtype=torch.float64)
    top, pushed, crowd = s[:k], torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    step = max(1, PAIRS // len(s))
    for start in range(0, k, step):
        own = top[start : start + step, None]
        gap = own - s
        # s_i / (s_i + s_j), and the gap to itself is 0
        share = own / (own + s).clamp_min(torch.finfo(torch.float64).tiny)
        near = 1 / (gap**2 + 2 * variance)
        pushed[start : start + step] = (share * gap * near).sum(1)
        # but itself
        crowd[start : start + step] = near.sum(1) - 1 / (2 * variance)
    # a value cannot be pushed further than where all of the update adds up
    pushed += abs(m - n) * top / (2 * top**2 + abs(m - n) * variance).clamp_min(torch.finfo(torch.float64).tiny)
    return (variance / (1 + CROWD * variance * crowd) + (variance * pushed).square()).sqrt()
