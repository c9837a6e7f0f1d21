"""The last step of every method: accurate triplets and their certificate, in fp64 where fp32 is too coarse."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .blocks import orthonormalize
from .operand import Operand
from .polynomial import MAX_DEGREE, improve
from .ritz import Certificate, Ritz, certify, rayleigh_ritz


def finish(
    operand: Operand, right: torch.Tensor, k: int, edge: Callable[[torch.Tensor], torch.Tensor], tolerance: float
) -> tuple[Ritz, Certificate]:
    """Ritz triplets of orthonormal rows ``right`` and their certificate; ``edge`` bounds what lies outside such rows.

    To be called when the space is good enough, or cannot get better in fp32. Where the tolerance is missed all the
    same, the products are repeated in fp64: outliers in the spectrum drown small residuals in the rounding of fp32. If
    that does not suffice, one round of correction in fp64 removes what fp32 left in the space itself.
    """
    ritz = rayleigh_ritz(operand, right)
    outside = edge(ritz.right)
    certificate = certify(ritz, ritz.residual(operand), k, outside)
    if operand.precision == torch.float32 and bool((certificate.degrees > tolerance).any()):
        wide = operand.widened()
        ritz = rayleigh_ritz(wide, orthonormalize(ritz.right.double()))
        residual = ritz.residual(wide)
        certificate = certify(ritz, residual, k, outside)
        if k < right.shape[-2] and bool((certificate.degrees > tolerance).any()):
            corrected = residual[..., : min(k + k // 8, right.shape[-2] - 1), :]
            ritz = improve(wide, ritz, corrected, MAX_DEGREE)
            certificate = certify(ritz, ritz.residual(wide), k, edge(ritz.right.to(operand.precision)))
    return ritz, certificate
