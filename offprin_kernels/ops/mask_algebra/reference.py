"""The definition of correct for ``mask_algebra``: plain PyTorch on unpacked bits, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...packing import row_bytes


def pack(dense: torch.Tensor) -> torch.Tensor:
    m, n = dense.shape
    padded = torch.zeros((m, row_bytes(n) * 8), dtype=torch.uint8, device=dense.device)
    padded[:, :n] = dense
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.int32, device=dense.device)
    return (padded.view(m, row_bytes(n), 8) * weights).sum(-1).to(torch.uint8)


def unpack(words: torch.Tensor, columns: int) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (words.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :columns].to(torch.bool)


def pair_counts(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    bits = torch.stack([unpack(mask, mask.shape[1] * 8).flatten() for mask in masks]).to(torch.float64)
    return (bits @ bits.T).to(torch.int64)  # exact: counts stay far below 2^53


def agreement(masks: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    votes = torch.stack([unpack(mask, columns) for mask in masks]).sum(0)
    return torch.bincount(votes.flatten(), minlength=len(masks) + 1)


def row_counts(words: torch.Tensor) -> torch.Tensor:
    return unpack(words, words.shape[1] * 8).sum(1)


def col_counts(words: torch.Tensor, columns: int) -> torch.Tensor:
    return unpack(words, columns).sum(0)
