"""What lies outside a block: the largest singular value of the weight on its complement."""

from __future__ import annotations

import torch

from .blocks import off, orthonormalize
from .operand import Operand

BLOCK, STEPS, MARGIN = 16, 4, 1.1


def probe(operand: Operand, right: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Upper estimate of the largest singular value outside the block ``right``; fp64 ``[...]``.

    A short block Lanczos run on the complement, from a random start, and a margin on its Ritz value: probabilistic.
    """
    size = operand.short - right.shape[-2]
    if size == 0:
        return torch.zeros(right.shape[:-2], dtype=torch.float64, device=right.device)
    block = min(BLOCK, size)
    basis = orthonormalize(off(operand.random_rows(block, generator), right))
    now = basis
    for _ in range(STEPS):
        image = off(operand.rough_gram(now), right)
        if basis.shape[-2] + block > size:
            break
        known = torch.cat([right, basis], -2)
        now = orthonormalize(off(image, known), known)
        basis = torch.cat([basis, now], -2)
    image = operand.forward(basis).double()
    return (MARGIN * torch.linalg.eigvalsh(image @ image.mT)[..., -1]).clamp_min(0).sqrt()
