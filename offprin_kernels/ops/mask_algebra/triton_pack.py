"""Bytes to bits and back, the Triton kernels of ``pack`` and ``unpack``.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "columns_over", "tiles"])
def pack_kernel(
    p_dense, p_bytes, rows: tl.int64, columns_over: tl.int64, tiles: tl.int64,
    DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dense bytes to bits; any byte but 0 is true."""
    program = tl.program_id(0).to(tl.int64)
    # A product with DIVISOR tells the compiler how row starts are aligned.
    columns = columns_over * DIVISOR
    row_bytes = (columns + 63) // 64 * 8
    o_m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = program % tiles
    o_byte = tile * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    if DIVISOR % 8 == 0:
        # Eight bytes made 0 or 1, multiplied, leave their bits in order in the top byte: no two products meet.
        m_word = (o_m < rows)[:, None] & (o_byte < columns_over * (DIVISOR // 8))[None, :]
        p_words = p_dense + o_m[:, None] * (columns_over * (DIVISOR // 8)) + o_byte[None, :]
        b_dense = tl.load(p_words, mask=m_word, other=0)
        b_true = (((b_dense & 0x7F7F7F7F7F7F7F7F) + 0x7F7F7F7F7F7F7F7F) | b_dense) >> 7 & 0x0101010101010101
        b_bytes = (b_true * 0x0102040810204080) >> 56
    else:
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_dense = (o_m < rows)[:, None] & (o_n < columns)[None, :]
        b_dense = tl.load(p_dense + o_m[:, None] * columns + o_n[None, :], mask=m_dense, other=0)
        b_bits = tl.reshape((b_dense != 0).to(tl.int32), [BLOCK_M, BLOCK_N // 8, 8]) << tl.arange(0, 8)[None, None, :]
        b_bytes = tl.sum(b_bits, axis=2)
    m_byte = (o_m < rows)[:, None] & (o_byte < row_bytes)[None, :]
    tl.store(p_bytes + o_m[:, None] * row_bytes + o_byte[None, :], b_bytes.to(tl.uint8), mask=m_byte)


@triton.jit(do_not_specialize=["rows", "columns_over", "tiles"])
def unpack_kernel(
    p_bytes, p_dense, rows: tl.int64, columns_over: tl.int64, tiles: tl.int64,
    DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bits to dense bytes, 0 or 1."""
    program = tl.program_id(0).to(tl.int64)
    columns = columns_over * DIVISOR
    row_bytes = (columns + 63) // 64 * 8
    o_m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = program % tiles
    if DIVISOR % 8 == 0:
        o_byte = tile * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        m_byte = (o_m < rows)[:, None] & (o_byte < columns_over * (DIVISOR // 8))[None, :]
        b_byte = tl.load(p_bytes + o_m[:, None] * row_bytes + o_byte[None, :], mask=m_byte, other=0).to(tl.uint64)
        # Byte i of the copies keeps bit i, and is raised to its top bit by an addition that cannot carry.
        b_words = (b_byte * 0x0101010101010101) & 0x8040201008040201
        b_words = ((b_words + 0x7F7F7F7F7F7F7F7F) >> 7) & 0x0101010101010101
        p_words = p_dense + o_m[:, None] * (columns_over * (DIVISOR // 8)) + o_byte[None, :]
        tl.store(p_words, b_words, mask=m_byte)
    else:
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_dense = (o_m < rows)[:, None] & (o_n < columns)[None, :]
        b_byte = tl.load(p_bytes + o_m[:, None] * row_bytes + (o_n // 8)[None, :], mask=m_dense, other=0).to(tl.int32)
        b_bits = (b_byte >> (tl.arange(0, BLOCK_N) % 8)[None, :]) & 1
        tl.store(p_dense + o_m[:, None] * columns + o_n[None, :], b_bits.to(tl.uint8), mask=m_dense)
