"""Angles between principal subspaces: small ones from their sine, and none below its resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..ops.subspace import TopK, topk_svd


@dataclass(frozen=True)
class Angles:
    """Principal angles between the top-k subspaces of two weights, in degrees, descending.

    Angles below ``resolution_degrees`` are NaN: nothing is known of them but that they are smaller.
    """

    left: torch.Tensor  # fp64 [k]: output side, columns of U
    right: torch.Tensor  # fp64 [k]: input side, columns of V
    resolution_degrees: float  # sum of both certificates: how far any of these angles may be off
    converged: bool  # whether both subspaces met the tolerance asked for
    base: TopK
    tuned: TopK

    @property
    def max_left(self) -> float | None:
        """Largest left angle; None where it is below resolution."""
        return resolved(self.left[0])

    @property
    def max_right(self) -> float | None:
        """Largest right angle; None where it is below resolution."""
        return resolved(self.right[0])


def resolved(angle: torch.Tensor) -> float | None:
    return None if bool(angle.isnan()) else float(angle)


def principal_angles(
    base: torch.Tensor | TopK, tuned: torch.Tensor | TopK, k: int, *, tol_degrees: float = 0.02, seed: int = 0
) -> Angles:
    """Angles by which training turned the top-k singular subspaces of a weight.

    Args:
        base: ``[m, n]`` weight before training, or its factors with the same k: then nothing is computed for it.
        tuned: ``[m, n]`` weight after training, iterated from the base's search space; or its factors.
        k: dimension of the subspaces.
        tol_degrees: certificate asked of the tuned weight. The base is asked for a quarter of it, because an
            unconverged base inflates every angle.
        seed: of the random start.

    Errors as :func:`topk_svd`. Angles are invariant to signs and to rotations inside degenerate blocks.
    Source: arXiv 2511.08567, section 3.2; sines as in Bjorck and Golub (1973).
    """
    first = base if isinstance(base, TopK) else topk_svd(base, k, tol_degrees=tol_degrees / 4, seed=seed)
    if first.k != k:
        raise ValueError(f"the base's factors have k = {first.k}, not {k}")
    if isinstance(tuned, TopK):
        second = tuned
    else:
        second = topk_svd(tuned, k, tol_degrees=tol_degrees, warm_start=first, seed=seed)
    resolution = min(90.0, float(first.error_degrees) + float(second.error_degrees))
    left, right = angles_between(first.U.mT, second.U.mT), angles_between(first.Vh, second.Vh)

    def known(angles: torch.Tensor) -> torch.Tensor:
        return angles.masked_fill(angles <= resolution, math.nan)

    return Angles(known(left), known(right), resolution, first.converged and second.converged, first, second)


def angles_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Principal angles in degrees (fp64 ``[k]``, descending) between the spans of orthonormal rows ``[k, length]``.

    Small ones from their sine (the part of b off a), which keeps the digits that the cosine loses; large ones from
    their cosine. Products in the rows' own precision, so that fp32 rows resolve some 1e-5 degrees; what they lack of
    orthonormality is taken out first, in k x k.
    """
    a, b = orthonormal(a), orthonormal(b)
    along = b @ a.mT
    off = b - along @ a
    # twice is enough: what rounding left of a in the difference
    off = off - (off @ a.mT) @ a
    sines = torch.linalg.eigvalsh(gram_of(off)).clamp(0, 1).sqrt().flip(-1)
    cosines = torch.linalg.eigvalsh(gram_of(along)).clamp(0, 1).sqrt()
    return torch.rad2deg(torch.where(sines < 0.7, torch.asin(sines), torch.acos(cosines)))


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.double()
    return wide @ wide.mT


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Nearly orthonormal rows made orthonormal: one Cholesky step, whose error is that of the products."""
    factor, info = torch.linalg.cholesky_ex(gram_of(rows))
    if bool(info):
        return torch.linalg.qr(rows.mT)[0].mT
    return torch.linalg.solve_triangular(factor, rows.double(), upper=False).to(rows.dtype)
