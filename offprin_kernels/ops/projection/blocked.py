"""Projections by rows: the library's products, never more than a few rows widened, nothing of the size of x made."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements widened at once: enough for products at full speed, a small share of any weight. On GPUs the handful of
# launches of a block, some 20 us, should be short beside its traffic: 400 MB at this size, 130 us at 3 TB/s (reckoned).
WIDENED, WIDENED_ON_GPUS = 1 << 21, 1 << 25


def project(x: torch.Tensor, u: torch.Tensor, vh: torch.Tensor, side: str, complement: bool, out: torch.Tensor) -> None:
    """Write the projection of ``x`` (or, with ``complement``, the rest) into ``out``, which may be ``x`` itself."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, vh = u.to(work), vh.to(work)
    core = u.new_empty(0)
    if side != "right":
        # what the rows of x add up to along the left vectors: [k, n], or [k, k] for both sides
        core = u.new_zeros((u.shape[1], x.shape[1] if side == "left" else vh.shape[0]))
        for rows, part in blocks(x, work):
            core.addmm_(u[rows].mT, part if side == "left" else part @ vh.mT)
    for rows, part in blocks(x, work):
        if side == "right":
            a, b = part @ vh.mT, vh
        elif side == "left":
            a, b = u[rows], core
        else:
            a, b = u[rows] @ core, vh
        target = out[rows]
        if target.dtype == work and target.is_contiguous() and not complement:
            torch.mm(a, b, out=target)
        elif complement and target.data_ptr() == part.data_ptr():
            target.addmm_(a, b, alpha=-1)
        elif complement:
            target.copy_(part.addmm(a, b, alpha=-1))
        else:
            target.copy_(a @ b)


def blocks(x: torch.Tensor, work: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, these rows in the working dtype); views of ``x`` where it has that dtype already."""
    most = WIDENED if x.device.type == "cpu" else WIDENED_ON_GPUS
    step = max(1, most // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(x.shape[0], start + step))
        yield rows, x[rows].to(work)
