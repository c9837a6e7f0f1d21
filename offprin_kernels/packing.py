"""How results lie in memory: matrix view of a weight, packed rows of bits, and the one place that allocates outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor: leading dimensions flattened; a vector is one row, a scalar is 1 x 1."""
    if len(shape) == 0:
        return 1, 1
    return math.prod(shape[:-1]), shape[-1]


def row_bytes(columns: int) -> int:
    """Bytes of one packed row: bits padded with zeros to a multiple of 64."""
    return (columns + 63) // 64 * 8


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised output tensor. Ops allocate here and nowhere else, so that tests can poison and fence them."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Output tensor of zeros."""
    return empty(shape, dtype, device).zero_()
