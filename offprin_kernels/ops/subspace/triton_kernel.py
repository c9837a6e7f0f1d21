"""Triton backend of ``subspace``: what PyTorch would spend whole copies on. Launches are in ``triton_launch.py``.

A product takes fp32 factors apart into bf16 pieces, whose products are exact in fp32; tensor cores add them up.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""

import triton
import triton.language as tl

from ... import numerics_triton as num

# Which tiles of a product matter: all; those on and below the diagonal of the result; or the left factor is lower
# triangular, so that depth ends at the diagonal.
ALL = tl.constexpr(0)
LOWER_RESULT = tl.constexpr(1)
LOWER_LEFT = tl.constexpr(2)


@triton.jit
def leading(b_x, INTERPRETED: tl.constexpr):
    """The nearest bf16 of fp32 values, and the exact remainder."""
    if INTERPRETED:
        # The interpreter would truncate, and multiply bit patterns: the same values, kept in fp32.
        b_first = num.codes_to_fp32(num.round_to_bf16_codes(b_x))
        b_rest = b_x - b_first
    else:
        # Devices round to nearest even too, and in an eighth of the instructions; these run for every tile anew.
        b_first = b_x.to(tl.bfloat16)
        b_rest = b_x - b_first.to(tl.float32)
    return b_first, b_rest


@triton.jit
def tile(p_x, o, m, PIECES: tl.constexpr, INTERPRETED: tl.constexpr):
    """Values at offsets: fp32 to be split, or bf16, from int16 bits, as they are."""
    if PIECES > 0:
        b_x = tl.load(p_x + o, mask=m, other=0.0)
    elif INTERPRETED:
        b_x = num.codes_to_fp32(tl.load(p_x + o, mask=m, other=0).to(tl.int32))
    else:
        # The pointer is cast and not the value: a value would pass through registers on its way to the tensor cores.
        b_x = tl.load(p_x.to(tl.pointer_type(tl.bfloat16), bitcast=True) + o, mask=m, other=0.0)
    return b_x


@triton.jit
def products(b_sum, b_x, b_a, X_PIECES: tl.constexpr, A_PIECES: tl.constexpr, ROUGH: tl.constexpr,
             INTERPRETED: tl.constexpr):  # fmt: skip
    """b_sum + b_x @ b_a, small terms first. 0 pieces: a factor that is bf16 already."""
    if X_PIECES == 0:
        b_x0 = b_x
    else:
        b_x0, b_rest = leading(b_x, INTERPRETED)
        if X_PIECES > 1:
            b_x1, b_rest = leading(b_rest, INTERPRETED)
            if X_PIECES > 2:
                b_x2, b_rest = leading(b_rest, INTERPRETED)
    if ROUGH:
        b_out = tl.dot(b_x0, b_a, b_sum, input_precision="ieee")
    else:
        # Tensor cores cut off what does not fit when they add, and the error grows with depth: so they add up one tile
        # only, and the tiles are added with rounding. The limit is for fp8 and means nothing here, but keeps the
        # compiler from merging both additions where there is one product.
        b_part = tl.zeros_like(b_sum)
        if A_PIECES == 3:
            # Six of nine: the other three are below 2^-26 of a product, less than its rounding to fp32.
            b_a0, b_rest = leading(b_a, INTERPRETED)
            b_a1, b_rest = leading(b_rest, INTERPRETED)
            b_a2, b_rest = leading(b_rest, INTERPRETED)
            b_part = tl.dot(b_x0, b_a2, b_part, input_precision="ieee")
            b_part = tl.dot(b_x2, b_a0, b_part, input_precision="ieee")
            b_part = tl.dot(b_x1, b_a1, b_part, input_precision="ieee")
            b_part = tl.dot(b_x0, b_a1, b_part, input_precision="ieee")
            b_part = tl.dot(b_x1, b_a0, b_part, input_precision="ieee")
            b_part = tl.dot(b_x0, b_a0, b_part, input_precision="ieee")
        else:
            if X_PIECES > 2:
                b_part = tl.dot(b_x2, b_a, b_part, input_precision="ieee")
            if X_PIECES > 1:
                b_part = tl.dot(b_x1, b_a, b_part, input_precision="ieee")
            b_part = tl.dot(b_x0, b_a, b_part, input_precision="ieee", max_num_imprecise_acc=1)
        b_out = b_sum + b_part
    return b_out


@triton.jit
def add_step(b_sum, step, p_x, p_a, o_m, o_n, rows, columns, depth, x_stride, a_stride, X_PIECES: tl.constexpr,
             A_PIECES: tl.constexpr, ROUGH: tl.constexpr, X_ALONG_DEPTH: tl.constexpr, A_ALONG_DEPTH: tl.constexpr,
             INTERPRETED: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """b_sum and what one tile of depth adds to it."""
    o_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < depth
    o_x = o_m[:, None] * x_stride + o_k[None, :] if X_ALONG_DEPTH else o_m[:, None] + o_k[None, :] * x_stride
    o_a = o_k[:, None] + o_n[None, :] * a_stride if A_ALONG_DEPTH else o_k[:, None] * a_stride + o_n[None, :]
    b_x = tile(p_x, o_x, (o_m < rows)[:, None] & m_k[None, :], X_PIECES, INTERPRETED)
    b_a = tile(p_a, o_a, m_k[:, None] & (o_n < columns)[None, :], A_PIECES, INTERPRETED)
    return products(b_sum, b_x, b_a, X_PIECES, A_PIECES, ROUGH, INTERPRETED)


@triton.jit(do_not_specialize=["rows_over", "columns_over", "depth_over", "x_over", "x_batch_over", "a_over",
                               "a_batch_over", "tiles_m", "tiles_n", "splits", "span", "batches"])  # fmt: skip
def product_kernel(
    p_x, p_a, p_y, rows_over: tl.int64, columns_over: tl.int64, depth_over: tl.int64, x_over: tl.int64,
    x_batch_over: tl.int64, a_over: tl.int64, a_batch_over: tl.int64, tiles_m: tl.int64, tiles_n: tl.int64,
    splits: tl.int64, span: tl.int64, batches: tl.int64,
    X_PIECES: tl.constexpr, A_PIECES: tl.constexpr, ROUGH: tl.constexpr, OUT_BF16: tl.constexpr, PART: tl.constexpr,
    X_ALONG_DEPTH: tl.constexpr, A_ALONG_DEPTH: tl.constexpr, M_DIVISOR: tl.constexpr, N_DIVISOR: tl.constexpr,
    K_DIVISOR: tl.constexpr, X_DIVISOR: tl.constexpr, A_DIVISOR: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of Y = X @ A, or of the part of it that ``span`` tiles of depth from ``split`` on contribute.

    X [rows, depth] and A [depth, columns] of each batch have one stride, the other is 1.
    """
    program = tl.program_id(0).to(tl.int64)
    # Tiles that read the same of A, which is the large factor, are neighbours and find it in the cache.
    tile_m = program % tiles_m
    tile_n = program // tiles_m % tiles_n
    split = program // tiles_m // tiles_n % splits
    batch = program // tiles_m // tiles_n // splits
    if PART == LOWER_RESULT:
        if tile_n * BLOCK_N >= (tile_m + 1) * BLOCK_M:
            return
    # Proven divisors, without which accesses along a row shrink to single elements.
    rows, columns, depth = rows_over * M_DIVISOR, columns_over * N_DIVISOR, depth_over * K_DIVISOR
    x_stride, a_stride = x_over * X_DIVISOR, a_over * A_DIVISOR
    p_x += batch * (x_batch_over * X_DIVISOR)
    p_a += batch * (a_batch_over * A_DIVISOR)
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * span
    last = tl.minimum(first + span, tl.cdiv(depth, BLOCK_K))
    if PART == LOWER_LEFT:
        last = tl.minimum(last, tl.cdiv((tile_m + 1) * BLOCK_M, BLOCK_K))
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if INTERPRETED:
        # Interpreters up to 3.6 have no such ranges with NumPy 2.4; compilers fetch ahead in such ranges only.
        step = first
        while step < last:
            b_sum = add_step(b_sum, step, p_x, p_a, o_m, o_n, rows, columns, depth, x_stride, a_stride, X_PIECES,
                             A_PIECES, ROUGH, X_ALONG_DEPTH, A_ALONG_DEPTH, INTERPRETED, BLOCK_K)  # fmt: skip
            step += 1
    else:
        for step in range(first, last):
            b_sum = add_step(b_sum, step, p_x, p_a, o_m, o_n, rows, columns, depth, x_stride, a_stride, X_PIECES,
                             A_PIECES, ROUGH, X_ALONG_DEPTH, A_ALONG_DEPTH, INTERPRETED, BLOCK_K)  # fmt: skip
    o_y = ((split * batches + batch) * rows + o_m[:, None]) * columns + o_n[None, :]
    m_y = (o_m < rows)[:, None] & (o_n < columns)[None, :]
    if OUT_BF16:
        tl.store(p_y + o_y, num.round_to_bf16_codes(b_sum).to(tl.int16), mask=m_y)
    else:
        tl.store(p_y + o_y, b_sum, mask=m_y)


@triton.jit(do_not_specialize=["count_over", "splits"])
def sum_kernel(p_parts, p_y, count_over: tl.int64, splits: tl.int64, OUT_BF16: tl.constexpr, DIVISOR: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Parts [splits, count] of a product added up, in their order."""
    count = count_over * DIVISOR
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_in = o < count
    b_sum = tl.load(p_parts + o, mask=m_in, other=0.0)
    split = splits * 0 + 1
    while split < splits:
        b_sum += tl.load(p_parts + split * count + o, mask=m_in, other=0.0)
        split += 1
    if OUT_BF16:
        tl.store(p_y + o, num.round_to_bf16_codes(b_sum).to(tl.int16), mask=m_in)
    else:
        tl.store(p_y + o, b_sum, mask=m_in)


@triton.jit(do_not_specialize=["size", "tiles", "splits", "batches"])
def mirror_kernel(p_parts, p_y, size: tl.int64, tiles: tl.int64, splits: tl.int64, batches: tl.int64,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Lower triangles of parts [splits, batches, size, size] added up in their order, and mirrored. May be in place."""
    program = tl.program_id(0).to(tl.int64)
    o_row = program % tiles * BLOCK + tl.arange(0, BLOCK)
    o_column = program // tiles % tiles * BLOCK + tl.arange(0, BLOCK)
    batch = program // tiles // tiles
    o_i, o_j = o_row[:, None], o_column[None, :]
    m_in = (o_i < size) & (o_j < size)
    o_from = batch * size * size + tl.maximum(o_i, o_j) * size + tl.minimum(o_i, o_j)
    b_sum = tl.load(p_parts + o_from, mask=m_in, other=0.0)
    split = splits * 0 + 1
    while split < splits:
        b_sum += tl.load(p_parts + split * batches * size * size + o_from, mask=m_in, other=0.0)
        split += 1
    tl.store(p_y + batch * size * size + o_i * size + o_j, b_sum, mask=m_in)


@triton.jit(do_not_specialize=["rows", "length_over", "tiles"])
def recurrence_kernel(p_image, p_now, p_force, p_before, p_x, p_rho, p_next, p_centre, rows: tl.int64,
                      length_over: tl.int64, tiles: tl.int64, DIVISOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One step of the filter, ((image - centre now + force) 2 / centre - rho before) / q, written over ``before``."""
    program = tl.program_id(0).to(tl.int64)
    length = length_over * DIVISOR
    row, part = program // tiles, program % tiles
    centre, x, rho = tl.load(p_centre + row // rows), tl.load(p_x + row), tl.load(p_rho + row)
    # Quotients of a row in fp64 and rounded once, as fp32 division is not to nearest, or loses subnormals.
    inverse = (1.0 / (2 * x - rho).to(tl.float64)).to(tl.float32)
    slope = (2.0 / centre.to(tl.float64)).to(tl.float32)
    o_in = part * BLOCK + tl.arange(0, BLOCK)
    m_in = o_in < length
    o = row * length + o_in
    b_image, b_now = tl.load(p_image + o, mask=m_in, other=0.0), tl.load(p_now + o, mask=m_in, other=0.0)
    b_force, b_before = tl.load(p_force + o, mask=m_in, other=0.0), tl.load(p_before + o, mask=m_in, other=0.0)
    b_next = (b_image - centre * b_now + b_force) * slope - rho * b_before
    tl.store(p_before + o, b_next * inverse, mask=m_in)
    # Not over rho itself, which other programs of the row may still have to read.
    if part == 0:
        tl.store(p_next + row, inverse)
