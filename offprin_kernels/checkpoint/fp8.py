"""fp8 weights: finding the scale that belongs to a weight, and multiplying it in, row slab by row slab.

Layouts: one scale per tensor (or per expert), per row (FBGEMM, compressed-tensors), or per block of 128 x 128
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2). All of them multiply, whatever their name says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .reader import Checkpoint, TensorInfo

SCALE_SUFFIXES = ("_scale_inv", "_scale")
SCALE_DTYPES = frozenset({"F32", "BF16", "F16", "F8_E8M0"})
DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class ScaleRef:
    """The scale of one fp8 tensor: its ``p``-th matrix of ``rows`` rows takes scale rows from ``p * scale_rows`` on."""

    name: str
    rows: int  # rows of one matrix of the weight
    scale_rows: int
    scale_columns: int
    block: tuple[int, int]  # weight rows and columns under one scale


def companion(checkpoint: Checkpoint, name: str) -> str | None:
    """The stored name of a weight's scale tensor, or None."""
    return next((name + suffix for suffix in SCALE_SUFFIXES if name + suffix in checkpoint.tensors), None)


def scale_of(checkpoint: Checkpoint, info: TensorInfo) -> ScaleRef | str:
    """How an fp8 tensor is scaled, or the reason why that is not known."""
    name = companion(checkpoint, info.name)
    if name is None:
        return f"fp8 without its scale (no {info.name}_scale_inv or {info.name}_scale); get the complete checkpoint"
    scale = checkpoint.tensors[name]
    if scale.dtype not in SCALE_DTYPES:
        return f"its scale {name} has dtype {scale.dtype}, which is no scale"
    rows, columns = (1, 1, *info.shape)[-2:]
    leading = info.shape[:-2]
    block = _block(checkpoint)
    per_block = (-(-rows // block[0]), -(-columns // block[1]))
    if scale.shape == (*leading, *per_block):
        return ScaleRef(name, rows, *per_block, block)
    if scale.shape in ((*leading, rows), (*leading, rows, 1)):
        return ScaleRef(name, rows, rows, 1, (1, max(columns, 1)))
    # One scale per matrix, or one for all of them.
    whole = (max(rows, 1), max(columns, 1))
    if math.prod(scale.shape) == 1:
        return ScaleRef(name, info.rows, 1, 1, (max(info.rows, 1), whole[1]))
    if leading and scale.shape in (leading, (*leading, 1), (*leading, 1, 1)):
        return ScaleRef(name, rows, 1, 1, whole)
    return (
        f"its scale {name} of shape {list(scale.shape)} is neither per tensor, per row nor per block of "
        f"{block[0]} x {block[1]} of {list(info.shape)}; get the complete checkpoint with its config.json"
    )


def _block(checkpoint: Checkpoint) -> tuple[int, int]:
    quantization = checkpoint.config.get("quantization_config")
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(item) is int and item > 0 for item in size):
        return size[0], size[1]
    return DEFAULT_BLOCK


def dequantize(checkpoint: Checkpoint, stored: torch.Tensor, scale: ScaleRef, start_row: int) -> torch.Tensor:
    """fp32 rows of a weight from its fp8 rows, the first of which is row ``start_row`` of the flattened tensor."""
    out = stored.to(torch.float32)
    if out.numel() == 0:
        return out
    rows = torch.arange(start_row, start_row + out.shape[0])
    scale_rows = rows // scale.rows * scale.scale_rows + rows % scale.rows // scale.block[0]
    first, last = int(scale_rows[0]), int(scale_rows[-1])
    values = _scale_rows(checkpoint, scale, first, last + 1)
    if scale.scale_columns == 1:
        return out.mul_(values[scale_rows - first])
    # Blocks of rows rather than the whole slab, so that the widened scales never take a slab of their own.
    which, lengths = torch.unique_consecutive(scale_rows - first, return_counts=True)
    for row, block in zip(which.tolist(), torch.split(out, lengths.tolist()), strict=True):
        block.mul_(values[row].repeat_interleave(scale.block[1])[: out.shape[1]])
    return out


def _scale_rows(checkpoint: Checkpoint, scale: ScaleRef, start: int, stop: int) -> torch.Tensor:
    """fp32 [stop - start, scale columns], whatever the stored shape of the scale tensor."""
    stored_columns = checkpoint.info(scale.name).columns
    begin, end = start * scale.scale_columns, stop * scale.scale_columns
    first = begin // stored_columns
    values = checkpoint.read(scale.name, first, -(-end // stored_columns)).to(torch.float32).reshape(-1)
    return values[begin - first * stored_columns :][: end - begin].view(-1, scale.scale_columns)
