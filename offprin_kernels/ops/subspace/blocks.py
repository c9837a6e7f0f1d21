"""Small dense algebra on blocks of vectors. A block holds its vectors as rows, ``[..., count, length]``.

Rows, because both products of a weight with a block, ``X A^T`` and ``Y A``, then run at full GEMM speed.
"""

from __future__ import annotations

import torch

from .dispatch import kernels


def orthonormalize(block: torch.Tensor, against: torch.Tensor | None = None, *, clean: bool = False) -> torch.Tensor:
    """Orthonormal rows, the first j spanning what the first j of ``block`` span; CholeskyQR2.

    Rows are scaled to unit length first, which keeps Cholesky safe on blocks with uneven norms. Where rows depend on
    each other, Householder QR takes over, with random rows in place of those that add nothing.

    Args:
        block: ``[..., count, length]``, count <= length.
        against: orthonormal rows to which the block is orthogonal up to rounding, and the result shall be.
        clean: no row of the block is so short that rounding could be a part of it that matters; not checked then.

    Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya (2015), CholeskyQR2.
    """
    epsilon = torch.finfo(block.dtype).eps
    scaled = unit(block)
    # rows that nearly vanished when they were projected are mostly rounding, and point anywhere
    if against is not None and not clean and bool((scaled @ against.mT).abs().amax() > epsilon**0.5):
        scaled = unit(off(unit(off(scaled, against)), against))
    # both as accurate as fp32 products, on tensor cores; the first computes one triangle, the second reads one
    fast = kernels(block.device) if block.dtype == torch.float32 else None
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(fast.gram(scaled) if fast else scaled @ scaled.mT)
        weakest = factor.diagonal(dim1=-2, dim2=-1).amin()
        # the Gram matrix is off by some eps, its root by sqrt(eps): what is smaller than that is noise
        if bool((failed != 0).any()) or not bool(weakest > 5 * epsilon**0.5):
            return replace_dependent(scaled, against)
        if fast:
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            scaled = fast.lower_product(torch.linalg.solve_triangular(factor, eye, upper=False), scaled)
        else:
            scaled = torch.linalg.solve_triangular(factor, scaled, upper=False)
    return scaled


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1; zero rows stay."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def replace_dependent(block: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
    """Householder QR; rows that add nothing new become random directions (fixed seed)."""
    q, r = torch.linalg.qr(block.mT)
    size = r.diagonal(dim1=-2, dim2=-1).abs()
    dependent = ~(size > 50 * torch.finfo(block.dtype).eps)
    fresh = torch.randn(block.shape, generator=torch.Generator().manual_seed(0), dtype=block.dtype)
    rows = torch.where(dependent[..., None], fresh.to(block.device), q.mT)
    for _ in range(2):
        if against is not None:
            rows = off(rows, against)
        rows = torch.linalg.qr(rows.mT)[0].mT
    return rows


def off(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Rows minus their projection onto orthonormal rows."""
    return rows - (rows @ basis.mT) @ basis


def off_(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """As :func:`off`, in place and without a block for the projection."""
    flat, along = (x.reshape(-1, *x.shape[-2:]) for x in (rows, basis))
    flat.baddbmm_(flat @ along.mT, along, alpha=-1)
    return rows


def spectral_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Largest singular value of ``[..., r, c]`` through the Gram matrix of its shorter side; fp64 ``[...]``.

    In the matrix' own precision but for the small eigenproblem: good to six digits in fp32.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.mT
    if matrix.shape[-2] == 0:
        return torch.zeros(matrix.shape[:-2], dtype=torch.float64, device=matrix.device)
    return torch.linalg.eigvalsh((matrix @ matrix.mT).double())[..., -1].clamp_min(0).sqrt()
