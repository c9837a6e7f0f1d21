"""``mask_algebra`` in the compiled CPU library: pointer marshalling, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import packing
from ..._backend import threads
from ..._native import library


def pack(dense: torch.Tensor) -> torch.Tensor:
    m, n = dense.shape
    words = packing.empty((m, packing.row_bytes(n)), torch.uint8, dense.device)
    library("cpu").mask_pack(dense.data_ptr(), m, n, words.data_ptr(), threads())
    return words


def unpack(words: torch.Tensor, columns: int) -> torch.Tensor:
    m = words.shape[0]
    dense = packing.empty((m, columns), torch.bool, words.device)
    library("cpu").mask_unpack(words.data_ptr(), m, columns, dense.data_ptr(), threads())
    return dense


def pair_counts(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    counts = packing.empty((len(masks), len(masks)), torch.int64, masks[0].device)
    addresses = [mask.data_ptr() for mask in masks]
    library("cpu").mask_pair_counts(addresses, masks[0].numel() // 8, counts.data_ptr(), threads())
    return counts


def agreement(masks: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    counts = packing.empty((len(masks) + 1,), torch.int64, masks[0].device)
    addresses = [mask.data_ptr() for mask in masks]
    elements = masks[0].shape[0] * columns
    library("cpu").mask_agreement(addresses, masks[0].numel() // 8, elements, counts.data_ptr(), threads())
    return counts


def row_counts(words: torch.Tensor) -> torch.Tensor:
    m, width = words.shape
    counts = packing.empty((m,), torch.int64, words.device)
    library("cpu").mask_row_counts(words.data_ptr(), m, width // 8, counts.data_ptr(), threads())
    return counts


def col_counts(words: torch.Tensor, columns: int) -> torch.Tensor:
    counts = packing.empty((columns,), torch.int64, words.device)
    library("cpu").mask_col_counts(words.data_ptr(), words.shape[0], columns, counts.data_ptr(), threads())
    return counts
