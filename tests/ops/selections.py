"""What tests of selections share: shapes and counts to try, masks as numpy arrays, and a sort that is not ours."""

from __future__ import annotations

import numpy as np
import torch

from offprin_kernels import packing

SHAPES = [(1, 1), (1, 700), (700, 1), (33, 65), (70, 130), (64, 256)]


def counts(total: int) -> list[int]:
    return sorted({0, 1, total // 1000, total // 10, total // 2, total - 1, total} - {-1})


def dense(words: torch.Tensor, columns: int) -> np.ndarray:
    """The mask's bits; the padding behind them must be zero."""
    assert words.dtype == torch.uint8 and words.shape[1] == packing.row_bytes(columns)
    bits = np.unpackbits(words.cpu().numpy(), axis=1, bitorder="little")
    assert not bits[:, columns:].any()
    return bits[:, :columns].astype(bool)


def smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Not ours: numpy's stable sort."""
    mask = np.zeros(keys.size, dtype=bool)
    mask[np.argsort(keys, axis=None, kind="stable")[:count]] = True
    return mask.reshape(keys.shape)


def on(device: torch.device, tensors) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]
