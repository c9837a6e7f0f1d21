"""``mask_algebra``: counting and packing on bit-packed masks, without ever unpacking them to bytes.

Masks are ``uint8 [rows, row_bytes(columns)]``: little-endian bits, each row padded with zero bits to 8 bytes.
Every function here trusts that the padding is zero; :class:`offprin_kernels.BitMask` keeps it so.
Set operations need no kernel: PyTorch's bitwise operators on an int64 view already run at memory speed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from ..._backend import choose
from ..._library import functional_op
from ...packing import row_bytes

__all__ = ["BACKENDS", "agreement", "col_counts", "pack", "pair_counts", "row_counts", "unpack"]

BACKENDS = ("triton", "cpu", "reference")  # in order of preference


def pack(dense: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """bool ``[m, n]`` -> packed ``uint8 [m, row_bytes(n)]``. Raises TypeError where the dtype is not bool."""
    if dense.dtype != torch.bool or dense.dim() != 2:
        raise TypeError(f"pack needs a 2-D bool tensor, got {dense.dim()}-D {dense.dtype}; compare with != 0 first")
    return _pack(dense.contiguous(), backend or "")


def unpack(words: torch.Tensor, columns: int, *, backend: str | None = None) -> torch.Tensor:
    """Packed ``uint8 [m, row_bytes(columns)]`` -> bool ``[m, columns]``."""
    check(words, columns)
    return _unpack(words.contiguous(), columns, backend or "")


def pair_counts(masks: Sequence[torch.Tensor], *, backend: str | None = None) -> torch.Tensor:
    """Sizes of all pairwise intersections of R equally shaped masks, each word read once.

    Returns int64 ``[R, R]``, symmetric, popcounts on the diagonal; exact.
    """
    check_alike(masks)
    return _pair_counts([mask.contiguous() for mask in masks], backend or "")


def agreement(masks: Sequence[torch.Tensor], columns: int, *, backend: str | None = None) -> torch.Tensor:
    """How many coordinates are set in exactly j of R masks: int64 ``[R + 1]``, summing to rows x columns; exact.

    Source: the consensus C_ij of arXiv 2511.08567, section 2.2, as a histogram of R * C.
    """
    check_alike(masks)
    check(masks[0], columns)
    return _agreement([mask.contiguous() for mask in masks], columns, backend or "")


def row_counts(words: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Set bits of each row, int64 ``[m]``; exact."""
    check(words, None)
    return _row_counts(words.contiguous(), backend or "")


def col_counts(words: torch.Tensor, columns: int, *, backend: str | None = None) -> torch.Tensor:
    """Set bits of each column, int64 ``[columns]``; exact."""
    check(words, columns)
    return _col_counts(words.contiguous(), columns, backend or "")


def check(words: torch.Tensor, columns: int | None) -> None:
    """Raises TypeError or ValueError where ``words`` is not a packed mask of that many columns."""
    if words.dtype != torch.uint8 or words.dim() != 2:
        raise TypeError(f"a packed mask is a 2-D uint8 tensor, got {words.dim()}-D {words.dtype}")
    if words.shape[1] % 8 or (columns is not None and row_bytes(columns) != words.shape[1]):
        wanted = "a multiple of 8" if columns is None else f"{row_bytes(columns)} for {columns} columns"
        raise ValueError(f"a packed mask row has {words.shape[1]} bytes; it must be {wanted}")


def check_alike(masks: Sequence[torch.Tensor]) -> None:
    """Raises where the masks cannot be counted against each other."""
    if not masks:
        raise ValueError("at least one mask is needed")
    for mask in masks:
        check(mask, None)
        if mask.shape != masks[0].shape or mask.device != masks[0].device:
            raise ValueError(
                f"masks differ: {tuple(masks[0].shape)} on {masks[0].device} and {tuple(mask.shape)} on {mask.device}"
            )


def implementation(device: torch.device, backend: str) -> ModuleType:
    """Chosen inside the ops, not by callers, so that a compiled graph holds no look-up of files or environment."""
    chosen = choose(device, BACKENDS, backend)
    module = {"reference": ".reference", "cpu": ".native", "triton": ".triton_kernel"}[chosen]
    return importlib.import_module(module, __package__)


@functional_op("mask_pack")
def _pack(dense: torch.Tensor, backend: str) -> torch.Tensor:
    return implementation(dense.device, backend).pack(dense)


@_pack.register_fake
def _(dense: torch.Tensor, backend: str) -> torch.Tensor:
    return dense.new_empty((dense.shape[0], row_bytes(dense.shape[1])), dtype=torch.uint8)


@functional_op("mask_unpack")
def _unpack(words: torch.Tensor, columns: int, backend: str) -> torch.Tensor:
    return implementation(words.device, backend).unpack(words, columns)


@_unpack.register_fake
def _(words: torch.Tensor, columns: int, backend: str) -> torch.Tensor:
    return words.new_empty((words.shape[0], columns), dtype=torch.bool)


@functional_op("mask_pair_counts")
def _pair_counts(masks: list[torch.Tensor], backend: str) -> torch.Tensor:
    return implementation(masks[0].device, backend).pair_counts(masks)


@_pair_counts.register_fake
def _(masks: list[torch.Tensor], backend: str) -> torch.Tensor:
    return masks[0].new_empty((len(masks), len(masks)), dtype=torch.int64)


@functional_op("mask_agreement")
def _agreement(masks: list[torch.Tensor], columns: int, backend: str) -> torch.Tensor:
    return implementation(masks[0].device, backend).agreement(masks, columns)


@_agreement.register_fake
def _(masks: list[torch.Tensor], columns: int, backend: str) -> torch.Tensor:
    return masks[0].new_empty((len(masks) + 1,), dtype=torch.int64)


@functional_op("mask_row_counts")
def _row_counts(words: torch.Tensor, backend: str) -> torch.Tensor:
    return implementation(words.device, backend).row_counts(words)


@_row_counts.register_fake
def _(words: torch.Tensor, backend: str) -> torch.Tensor:
    return words.new_empty((words.shape[0],), dtype=torch.int64)


@functional_op("mask_col_counts")
def _col_counts(words: torch.Tensor, columns: int, backend: str) -> torch.Tensor:
    return implementation(words.device, backend).col_counts(words, columns)


@_col_counts.register_fake
def _(words: torch.Tensor, columns: int, backend: str) -> torch.Tensor:
    return words.new_empty((columns,), dtype=torch.int64)
