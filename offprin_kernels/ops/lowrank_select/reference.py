"""The definition of correct for ``lowrank_select``: plain PyTorch, any device, every key in memory and sorted."""

from __future__ import annotations

import torch

from ... import numerics
from ...packing import matrix_shape
from ..mask_algebra import reference as mask_algebra
from . import contract as c


def select_lowrank(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, count: int) -> torch.Tensor:
    magnitudes = numerics.fp32_bits(left @ (values[:, None] * right)) & c.LARGEST_MAGNITUDE
    if bool((magnitudes >= c.INFINITY[torch.float32]).any()):
        raise ValueError(c.OVERFLOW)
    return smallest(c.LARGEST_MAGNITUDE - magnitudes, count)


def select_smallest(weight: torch.Tensor, count: int) -> torch.Tensor:
    integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
    magnitudes = weight.view(integers) & torch.iinfo(integers).max
    if bool((magnitudes >= c.INFINITY[weight.dtype]).any()):
        raise ValueError(c.NONFINITE)
    return smallest(magnitudes.reshape(matrix_shape(weight.shape)), count)


def select_random(rows: int, columns: int, count: int, stream: int, device: torch.device) -> torch.Tensor:
    flat = torch.arange(rows * columns, dtype=torch.int64, device=device)
    hashes = numerics.shifted_right(numerics.splitmix64(stream, flat), 64 - c.HASH_BITS)
    return smallest(hashes.reshape(rows, columns), count)


def smallest(keys: torch.Tensor, count: int) -> torch.Tensor:
    """The mask of the ``count`` smallest keys of a matrix; a stable sort keeps equal ones in order of flat index."""
    order = torch.sort(keys.flatten(), stable=True).indices
    mask = torch.zeros(keys.numel(), dtype=torch.bool, device=keys.device)
    mask[order[:count]] = True
    return mask_algebra.pack(mask.reshape(keys.shape))
