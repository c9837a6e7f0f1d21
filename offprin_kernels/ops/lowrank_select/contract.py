"""What every backend of ``lowrank_select`` agrees on: keys, hash constants and allocation, no arithmetic on weights.

A selection takes the ``count`` coordinates with the smallest integer keys, those at the lowest flat index first among
equal ones. Keys are

* of a product: 0x7FFFFFFF less the fp32 magnitude bits, so that the largest entries come first;
* of a weight: the magnitude bits, 31 of fp32 and 15 of bf16 and fp16;
* of a random set: the top 32 bits of SplitMix64's output at the flat index.
"""

from __future__ import annotations

import torch

from ... import numerics, packing

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# The magnitude bits of Inf; larger ones are NaN.
INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
LARGEST_MAGNITUDE = 0x7FFFFFFF
HASH_BITS = 32

OVERFLOW = "the product of left, values and right overflows fp32; scale values down"
NONFINITE = "weight holds NaN or Inf; its smallest entries are undefined"
CHANGED = "lowrank_select counted differently in two passes; its input changed while it ran"


def stream(seed: int) -> int:
    """Where a seed's stream of hashes begins (int64): mixed, or neighbouring seeds would share most of their stream."""
    return numerics.signed(numerics.mixed(seed))


def allocate(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return packing.empty((rows, packing.row_bytes(columns)), torch.uint8, device)
