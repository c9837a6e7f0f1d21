"""``lowrank_select`` in the compiled CPU library: pointer marshalling, nothing else."""

from __future__ import annotations

import torch

from ..._backend import threads
from ..._native import library
from ...packing import matrix_shape
from . import contract as c


def select_lowrank(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, count: int) -> torch.Tensor:
    (m, k), n = left.shape, right.shape[1]
    words = c.allocate(m, n, left.device)
    # Factors often come as views of larger or transposed matrices: their strides cost nothing, copies would.
    library("cpu").select_product(
        left.data_ptr(), left.stride(), values.data_ptr(), right.data_ptr(), right.stride(), m, n, k, count,
        words.data_ptr(), threads(),
    )  # fmt: skip
    return words


def select_smallest(weight: torch.Tensor, count: int) -> torch.Tensor:
    m, n = matrix_shape(weight.shape)
    words = c.allocate(m, n, weight.device)
    code = c.DTYPE_CODES[weight.dtype]
    library("cpu").select_weight(weight.data_ptr(), code, m, n, count, words.data_ptr(), threads())
    return words


def select_random(rows: int, columns: int, count: int, stream: int, device: torch.device) -> torch.Tensor:
    words = c.allocate(rows, columns, device)
    library("cpu").select_hash(stream, rows, columns, count, words.data_ptr(), threads())
    return words
