"""Weights with the spectra that pretrained layers have: slow decay, and truth from fp64 LAPACK beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def slow_weight(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """bf16 ``[m, n]``: singular values i^-0.5 in random directions, plus a Gaussian bulk up to 0.15 of the largest."""
    generator = torch.Generator().manual_seed(seed)
    p = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, p, generator=generator))[0] for size in (m, n))
    values = torch.arange(1, p + 1) ** -0.5
    noise = torch.randn(m, n, generator=generator) * (0.15 / (m**0.5 + n**0.5))
    return ((u * values) @ v.T + noise).bfloat16()


def few_ulp(weight: torch.Tensor, share: float = 0.1, seed: int = 1) -> torch.Tensor:
    """The weight with this share of its entries moved by one ULP, as reinforcement learning does."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.rand(weight.shape, generator=generator) < share
    step = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, 1, -1).to(torch.int16)
    return (weight.view(torch.int16) + step * moved).view(torch.bfloat16)


@dataclass(frozen=True)
class Truth:
    """All singular values and the leading vectors of a square or tall weight, through its fp64 Gram matrix."""

    values: torch.Tensor  # fp64, descending
    left: torch.Tensor  # columns
    right: torch.Tensor  # columns

    @classmethod
    def of(cls, weight: torch.Tensor, vectors: int) -> Truth:
        wide = weight.double()
        squares, right = torch.linalg.eigh(wide.T @ wide)
        values, right = squares.flip(-1).clamp_min(0).sqrt(), right.flip(-1)[:, :vectors].clone()
        return cls(values, wide @ right / values[:vectors], right)

    def angle(self, u: torch.Tensor, v: torch.Tensor) -> float:
        """Largest angle of columns u, v to the true subspaces, in degrees, from the sine."""
        worst = 0.0
        for true, ours in ((self.left, u), (self.right, v)):
            basis = torch.linalg.qr(ours.double())[0]
            known = true[:, : ours.shape[1]]
            sine = torch.linalg.matrix_norm(basis - known @ (known.T @ basis), ord=2)
            worst = max(worst, float(torch.rad2deg(torch.asin(sine.clamp(max=1)))))
        return worst
