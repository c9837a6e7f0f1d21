"""Keys of a tile, made anew on every pass: what the Triton kernels of ``lowrank_select`` compare.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""

import triton
import triton.language as tl

from ... import numerics_triton as num
from . import contract as c

PRODUCT = tl.constexpr(0)
WEIGHT = tl.constexpr(1)
HASH = tl.constexpr(2)
LARGEST_MAGNITUDE = tl.constexpr(c.LARGEST_MAGNITUDE)


@triton.jit
def product_keys(p_inputs, o_m, o_n, rows, columns, rank, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """0x7FFFFFFF less the magnitude bits of a tile of left @ (values * right)."""
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # No `for`, whose tiles fetched ahead need more registers than there are.
    k = rank * 0
    while k < rank:
        o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < rank
        m_left, m_right = (o_m < rows)[:, None] & m_k[None, :], m_k[:, None] & (o_n < columns)[None, :]
        b_left = tl.load(p_inputs[0] + o_m[:, None] * rank + o_k[None, :], mask=m_left, other=0.0)
        b_values = tl.load(p_inputs[1] + o_k, mask=m_k, other=0.0)
        b_right = tl.load(p_inputs[2] + o_k[:, None] * columns + o_n[None, :], mask=m_right, other=0.0)
        b_sum = tl.dot(b_left, b_values[:, None] * b_right, b_sum, input_precision="ieee")
        k += BLOCK_K
    return LARGEST_MAGNITUDE - (num.fp32_bits(b_sum) & LARGEST_MAGNITUDE)


@triton.jit
def keys_of(p_inputs, o_m, o_n, b_flat, m_in, rows, columns, rank, stream, SOURCE: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Keys of a tile, as int64: 32 unsigned bits, compared with bounds of any size."""
    if SOURCE == PRODUCT:
        b_keys = product_keys(p_inputs, o_m, o_n, rows, columns, rank, BLOCK_M, BLOCK_N, BLOCK_K)
    elif SOURCE == WEIGHT:
        b_bits = tl.load(p_inputs[0] + b_flat, mask=m_in, other=0)
        b_keys = b_bits & (0x7FFF if b_bits.dtype == tl.int16 else 0x7FFFFFFF)
    else:
        b_keys = num.splitmix64(stream, b_flat) >> 32
    return b_keys.to(tl.int64)
