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
    now = orthonormalize(off(operand.random_rows(block, generator), right))
    known, images = right, []
    for step in range(STEPS):
        known = torch.cat([known, now], -2)
        images.append(operand.rough_gram(now))
        if step + 1 < STEPS and known.shape[-2] + block <= operand.short:
            now = orthonormalize(off(images[-1], known), known)
        else:
            break
    basis = known[..., right.shape[-2] :, :]
    projected = basis.double() @ torch.cat(images, -2).double().mT
    largest = torch.linalg.eigvalsh((projected + projected.mT) / 2)[..., -1]
    return (MARGIN * largest).clamp_min(0).sqrt()
