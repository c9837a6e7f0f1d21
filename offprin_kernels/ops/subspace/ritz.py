"""Rayleigh-Ritz on a block, and the certificate: how far the leading k Ritz vectors are from the true ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .blocks import orthonormalize, spectral_norm
from .operand import Operand

TINY = torch.finfo(torch.float64).tiny

# Values below this share of the largest are rounding: in squares, and in fp32 products, no more can be told.
VANISHING = 1e-5

# Rounding inside the block is measured once; what is hidden is of the same kind, so it is counted this many times.
ROUNDING_SAFETY = 4.0


@dataclass
class Ritz:
    """Ritz triplets of ``A``, descending: ``left`` [l, M] and ``right`` [l, p] (rows), ``values`` [l] (fp64)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def residual(self, operand: Operand, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows ``u_i^T A - s_i v_i^T`` of triplets begin to end (all) ``[..., end - begin, p]``.

        ``A v_i = s_i u_i`` holds by construction. In exact arithmetic these rows are orthogonal to the block; what they
        have in it is rounding, which the certificate measures.
        """
        values = self.values[..., begin:end, None].to(self.right.dtype)
        return operand.backward(self.left[..., begin:end, :]) - values * self.right[..., begin:end, :]


def rayleigh_ritz(operand: Operand, right: torch.Tensor) -> Ritz:
    """Ritz triplets from orthonormal rows ``right``.

    The small problem is solved through the fp64 Gram matrix of ``right A^T``: of fp32 data that loses nothing above
    1e-8 of the largest value.
    """
    image = operand.forward(right)
    wide = image.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    values = squares.flip(-1).clamp_min(0).sqrt()
    turn = vectors.flip(-1).mT.to(right.dtype)
    right, left = turn @ right, turn @ image
    vanishing = (values <= VANISHING * values[..., :1])[..., None]
    if bool(vanishing.any()):
        # they say nothing about their left vectors: complete the basis rather than divide by rounding
        kept = left.masked_fill(vanishing, 0.0)
        left = orthonormalize(kept)
        left = torch.where((left * kept).sum(-1, keepdim=True) < 0, -left, left)
    else:
        left = left / values[..., None].to(left.dtype)
    return Ritz(left, values, right)


@dataclass
class Certificate:
    """Bound on the largest principal angle between true and computed k-dimensional subspaces, left and right."""

    degrees: torch.Tensor  # fp64 [...]; 90 where nothing can be said
    rounding_degrees: torch.Tensor  # the part of it that more iterations cannot lower
    gap: torch.Tensor  # s_k - s_{k+1}, fp64 [...]
    residual: torch.Tensor  # |A^T u_i - s_i v_i|, fp64 [..., k]

    def limited_by_rounding(self, tolerance: float) -> bool:
        """Whether no method in this precision would do better."""
        return bool((self.rounding_degrees > tolerance / 2).any())


def certify(ritz: Ritz, residual: torch.Tensor, k: int, edge: torch.Tensor) -> Certificate:
    """Angle bound from the residuals of all l triplets and ``edge``, an upper bound of what lies outside the block.

    With H = A^T A in the basis of the block, the couplings E_i = s_i r_i lead out of it, and there are none within. Let
    lam = s_k^2 and g_j = lam - s_j^2 for j > k. Eliminating the trailing Ritz vectors (a Schur complement) leaves

        sin(angle) <= |E_1..k| / (lam - nu) * sqrt(1 + |E_j / g_j|^2),    nu = edge^2 + |E_j / sqrt(g_j)|^2

    and the same with s_i^2 in place of lam for every group of vectors that have more room (see ``tilt``). This follows
    the true error within a factor of 2 to 3 once converged; residual / gap alone is 20 to 90 times too large on slowly
    decaying spectra. It is rigorous given ``edge`` and exact arithmetic. Rounding inside the block, where gaps are
    small, is added from what was measured of it. Zero where k is the whole space.
    """
    values, right = ritz.values, ritz.right
    lam = values[..., k - 1] ** 2
    count, size = right.shape[-2:]
    after = values[..., k] if count > k else edge
    gap = values[..., k - 1] - after
    lengths = torch.linalg.vector_norm(residual[..., :k, :], dim=-1).double()
    if k == size:
        zero = torch.zeros_like(lam)
        return Certificate(zero, zero, values[..., k - 1], lengths)
    inner = residual @ right.mT
    coupling = (residual - inner @ right) * values[..., None].to(right.dtype)
    # clamped where there is no gap, which is found undefined below
    inside = torch.maximum(lam[..., None] - values[..., k:] ** 2, 1e-15 * lam[..., None] + TINY)
    second = coupling[..., k:, :]
    c = spectral_norm(second / inside.sqrt()[..., None].to(right.dtype)) ** 2
    a = spectral_norm(second / inside[..., None].to(right.dtype))
    room = values[..., :k] ** 2 - (edge**2 + c)[..., None]
    sine = torch.where(room[..., -1] > 0, tilt(coupling[..., :k, :], room) * (1 + a**2).sqrt(), 1.0)
    rounding = ROUNDING_SAFETY * mixing(values, inner, right, k)
    undefined = gap <= 10 * torch.finfo(right.dtype).eps * values[..., 0]
    degrees = torch.rad2deg(torch.asin(sine.clamp(0, 1)) + rounding).clamp(max=90.0)
    return Certificate(
        torch.where(undefined, 90.0, degrees),
        torch.where(undefined, 90.0, torch.rad2deg(rounding).clamp(max=90.0)),
        gap,
        lengths,
    )


def tilt(coupling: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Bound on |X|, X solving the Sylvester equation of couplings E ``[..., k, p]`` with ``room = s_i^2 - nu`` > 0.

    |E| / min(room) would waste the room that outliers have: rounding, relative to their own size, would drown the
    rest. So vectors are grouped by powers of two of their room, each group has its own bound, and squares add up.
    """
    gram = (coupling @ coupling.mT).double()
    least = room[..., -1:].clamp_min(TINY)
    group = torch.log2((room / least).clamp_min(1)).floor()
    total = torch.zeros_like(room[..., 0])
    for index in group.unique().tolist():
        member = (group == index).to(gram.dtype)
        norm2 = torch.linalg.eigvalsh(gram * member[..., :, None] * member[..., None, :])[..., -1].clamp_min(0)
        total = total + norm2 / (least[..., 0] * 2.0**index) ** 2
    return total.sqrt()


def mixing(values: torch.Tensor, inner: torch.Tensor, right: torch.Tensor, k: int) -> torch.Tensor:
    """How far rounding turns the leading k towards the trailing vectors of the block, in radians, fp64.

    First order: an entry (i, j) of H that should be zero turns vector i by itself / (s_i^2 - s_j^2). Seen in the
    residual (``inner``) and in how far the rows are from orthonormal.
    """
    squares = values**2
    between = torch.maximum(squares[..., :k, None] - squares[..., None, k:], 1e-15 * squares[..., :1, None] + TINY)
    skew = (right[..., :k, :] @ right[..., k:, :].mT).double()
    seen = inner[..., :k, k:].double() * values[..., :k, None]
    return spectral_norm(seen / between) + spectral_norm(skew * squares[..., :k, None] / between)
