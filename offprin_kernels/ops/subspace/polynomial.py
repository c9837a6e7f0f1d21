"""Projected polynomial correction: refines a block of Ritz vectors with products that may be rough.

A Chebyshev recurrence of A^T A, damped on what lies outside the block, is applied to the residuals instead of the
vectors: errors of its products are then relative to the residual, and shrink with it. Everything is projected off the
block after every product; without that the recurrence diverges on weights with outliers.

Source: after R-ChFSI, arXiv 2503.22652; the projection is ours.
"""

from __future__ import annotations

import torch

from .blocks import off, off_, orthonormalize
from .operand import Operand
from .ritz import Ritz, rayleigh_ritz, tilt

MAX_DEGREE = 4  # more gains nothing: the trailing vectors of the block limit a round


def improve(operand: Operand, ritz: Ritz, residual: torch.Tensor, degree: int) -> Ritz:
    """Better triplets: the vectors that ``residual`` has rows for corrected by a polynomial, the rest kept."""
    count = residual.shape[-2]
    corrected = ritz.right[..., :count, :] + filtered(operand, ritz, off(residual, ritz.right), degree)
    return rayleigh_ritz(operand, orthonormalize(torch.cat([corrected, ritz.right[..., count:, :]], -2)))


def filtered(operand: Operand, ritz: Ritz, residual: torch.Tensor, degree: int) -> torch.Tensor:
    """Corrections to the vectors that the residual rows belong to."""
    values = ritz.values[..., : residual.shape[-2], None]
    # [0, s_l^2] is damped; fewer rows than the block has keep every vector's own value outside it
    half = damped_edge(ritz)[..., None, None] / 2
    x = ((values**2 - half) / half).to(residual.dtype)
    centre = half.to(residual.dtype)
    force = residual * values.to(residual.dtype)
    before, now, rho = torch.zeros_like(force), force / (centre * x), 1 / x
    if operand.kernels is not None:
        # one launch a step, which overwrites the block before last
        before, now, force, x, centre = (t.contiguous() for t in (before, now, force, x, centre))
        for _ in range(degree - 1):
            image = off_(operand.rough_gram(now), ritz.right)
            rho = operand.kernels.recurrence(image, now, force, before, x, rho, centre)
            before, now = now, before
        return now
    for _ in range(degree - 1):
        image = off(operand.rough_gram(now), ritz.right)
        q = 2 * x - rho
        before, now = now, ((image - centre * now + force) * (2 / centre) - rho * before) / q
        rho = 1 / q
    return now


def damped_edge(ritz: Ritz) -> torch.Tensor:
    """Upper end of the damped interval of A^T A; not zero, even where the block ends in vanishing values."""
    squares = ritz.values**2
    return torch.maximum(squares[..., -1], 1e-6 * squares[..., 0]).clamp_min(1e-30)


def estimate(ritz: Ritz, residual: torch.Tensor, k: int) -> torch.Tensor:
    """Roughly the largest angle of the leading k, in degrees: the smallest value inside stands for the edge outside."""
    values = ritz.values
    room = values[..., :k] ** 2 - values[..., -1:] ** 2
    coupling = off(residual[..., :k, :], ritz.right) * values[..., :k, None].to(residual.dtype)
    sine = torch.where(room[..., -1] > 0, tilt(coupling, room), 1.0)
    return torch.rad2deg(torch.asin(sine.clamp(max=1.0)))


def degree(ritz: Ritz, k: int, gain: float) -> int:
    """Smallest degree whose Chebyshev polynomial makes vector k better by this factor."""
    x = (2 * ritz.values[..., k - 1] ** 2 / damped_edge(ritz) - 1).amin().clamp_min(1)
    for m in range(2, MAX_DEGREE):
        if float(torch.cosh(m * torch.acosh(x))) >= gain:
            return m
    return MAX_DEGREE
