"""Dtype tags as safetensors spells them, and the torch dtypes behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Bits of one element, for every tag the safetensors format defines.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

# Sub-byte formats are missing on purpose: nothing here reads them as numbers.
TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
TAGS = {dtype: tag for tag, dtype in TORCH.items()}

COMPARABLE = frozenset({"BF16", "F16", "F32"})
FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
INTEGER = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


def byte_size(tag: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a known dtype. Raises KeyError for an unknown tag, ValueError for a part of a byte."""
    bits = BITS[tag]
    for size in shape:
        bits *= size
    if bits % 8:
        raise ValueError(f"{bits} bits are not whole bytes")
    return bits // 8
