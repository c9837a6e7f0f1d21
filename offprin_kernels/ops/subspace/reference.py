"""The definition of correct: LAPACK's full SVD in fp64."""

from __future__ import annotations

import torch

from .contract import Solution
from .operand import Operand
from .ritz import Certificate, Ritz


def solve(operand: Operand, k: int) -> Solution:
    """All singular triplets in fp64. The error is what fp64 rounding does at the gap."""
    wide = operand.widened()
    a = wide.exact.mT if wide.transposed else wide.exact
    left, values, right = torch.linalg.svd(a, full_matrices=False)
    ritz = Ritz(left.mT, values, right)
    residual = ritz.residual(wide, 0, k).norm(dim=-1)
    if k == operand.short:
        zero = torch.zeros_like(values[..., 0])
        return Solution(ritz, Certificate(zero, zero, values[..., -1], residual), 1, "reference")
    gap = values[..., k - 1] - values[..., k]
    eps = torch.finfo(torch.float64).eps
    ratio = (operand.short * eps * values[..., 0] / gap.clamp_min(1e-300)).clamp(max=1.0)
    degrees = torch.where(gap <= 10 * eps * values[..., 0], 90.0, torch.rad2deg(torch.asin(ratio)))
    return Solution(ritz, Certificate(degrees, degrees, gap, residual), 1, "reference")
