"""What every backend of ``lowrank_select`` agrees on: keys, hash constants and allocation, no arithmetic on weights.

A selection takes the ``count`` coordinates with the smallest integer keys, those at the lowest flat index first among
equal ones. Keys are

* of a product: 0x7FFFFFFF less the fp32 magnitude bits, so that the largest entries come first;
* of a weight: the magnitude bits, 31 of fp32 and 15 of bf16 and fp16;
* of a random set: the top 32 bits of SplitMix64's output at the flat index.
"""

from __future__ import annotations

import torch

from ... import packing

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# The magnitude bits of Inf; larger ones are NaN.
INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
LARGEST_MAGNITUDE = 0x7FFFFFFF
HASH_BITS = 32

OVERFLOW = "the product of left, values and right overflows fp32; scale values down"
NONFINITE = "weight holds NaN or Inf; its smallest entries are undefined"
CHANGED = "lowrank_select counted differently in two passes; its input changed while it ran"

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; constants of Vigna's public-domain version).
GAMMA = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def signed(x: int) -> int:
    """64 bits as the int64 that has them."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def stream(seed: int) -> int:
    """Where a seed's stream of hashes begins (int64): mixed, or neighbouring seeds would share most of their stream."""
    z = (seed + GAMMA) & ((1 << 64) - 1)
    for shift, factor in zip((30, 27), MIX, strict=True):
        z = (z ^ (z >> shift)) * factor & ((1 << 64) - 1)
    return signed(z ^ (z >> 31))


def allocate(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return packing.empty((rows, packing.row_bytes(columns)), torch.uint8, device)
