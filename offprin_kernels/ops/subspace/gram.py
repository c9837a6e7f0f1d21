"""Gram matrix and a symmetric eigensolver: exact in effect, cheapest for more than a few per cent of the vectors."""

from __future__ import annotations

from functools import partial

import torch

from .contract import Solution
from .finish import finish
from .operand import Operand

# Below this size fp64 costs nothing that matters.
SMALL = 1024


def solve(operand: Operand, k: int, extra: int, tolerance: float) -> Solution:
    """Top k with ``extra`` more beside them; in fp64 where fp32 does not meet the tolerance."""
    rows = min(operand.short, k + extra)
    work = operand.widened() if operand.short <= SMALL else operand
    while True:
        squares, right = leading(work.gram(), rows)
        # the eigenvalue next to the block, and what rounding may have done to it
        slack = 20 * torch.finfo(work.precision).eps * squares[..., 0]
        edge = (squares[..., rows] + slack).clamp_min(0).sqrt() if rows < operand.short else torch.zeros_like(slack)
        ritz, certificate = finish(work, right, k, partial(known, edge), tolerance)
        if work.precision == torch.float64 or bool((certificate.degrees <= tolerance).all()):
            whole = work.precision == torch.float64 and squares.shape[-1] == operand.short
            return Solution(ritz, certificate, 1, "gram", squares if whole else None)
        work = operand.widened()


def known(edge: torch.Tensor, _right: torch.Tensor) -> torch.Tensor:
    """The edge outside a block of eigenvectors, which needs no probing."""
    return edge


def leading(gram: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (fp64, descending; all of them or the largest ``count + 1``) and ``count`` vectors as rows."""
    size = gram.shape[-1]
    if gram.ndim == 2 and gram.device.type == "cpu" and count < size // 2 and size > SMALL:
        try:
            # LAPACK's partial solver, which PyTorch does not carry
            from scipy.linalg import eigh
        except ModuleNotFoundError:
            pass
        else:
            values, vectors = eigh(
                gram.numpy(), subset_by_index=[size - count - 1, size - 1], driver="evr", check_finite=False
            )
            found = torch.from_numpy(values).double().flip(-1), torch.from_numpy(vectors).flip(-1).mT
            return found[0], found[1][:count].contiguous()
    values, vectors = torch.linalg.eigh(gram)
    return values.double().flip(-1), vectors.flip(-1).mT[..., :count, :].contiguous()
