# mypy: disable-error-code="assignment"
"""The general Triton kernel of ``update_scan``: every dtype, rule and output, tile by tile.

What is added up over tiles travels as one tuple, the *state*: counts of rules and counters, histograms, sums of norms,
and last the maxima. What is not asked for is not in it.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""

import triton
import triton.language as tl

from ... import numerics_triton as num
from . import contract as c
from . import triton_rules as rule

# Stand left of "&": in the interpreter an int has no "&" with a constexpr on its right.
WANT_MASK = tl.constexpr(int(c.Output.MASK))
WANT_ROWS = tl.constexpr(int(c.Output.ROWS))
WANT_COLUMNS = tl.constexpr(int(c.Output.COLUMNS))
WANT_TRANSITIONS = tl.constexpr(int(c.Output.TRANSITIONS))
WANT_NONFINITE = tl.constexpr(int(c.Output.NONFINITE))
WANT_ULP = tl.constexpr(int(c.Output.ULP_HISTOGRAM))
WANT_EXPONENTS = tl.constexpr(int(c.Output.EXPONENT_HISTOGRAM))
WANT_NORMS = tl.constexpr(int(c.Output.NORMS))

ULP_BINS = tl.constexpr(c.ULP_BINS)
EXPONENT_BINS = tl.constexpr(c.EXPONENT_BINS)
NORMS = tl.constexpr(c.NORMS)
COUNTERS = tl.constexpr(c.COUNTERS)

# Slots of the block that gathers a tile's counts: two for each rule, then the counters.
COUNTER_SLOT = tl.constexpr(16)
SLOTS = tl.constexpr(32)


@triton.jit
def fold(b_x, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    """Sums of FOLD neighbours, which one thread has loaded: no traffic between threads."""
    return tl.sum(tl.reshape(b_x, [BLOCK // FOLD, FOLD]), axis=1)


@triton.jit
def two_counts(m_low, m_high, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    """Numbers of true in two tiles, in the halves of one word: a program sees less than 2^15 elements."""
    return fold(m_low.to(tl.int32) + (m_high.to(tl.int32) << 16), BLOCK, FOLD)


@triton.jit
def norm_sums(b_a, b_b, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    b_wide = b_a.to(tl.float64)
    b_update = b_b.to(tl.float64) - b_wide
    b_squares = fold(b_wide * b_wide, BLOCK, FOLD)
    return (b_squares, fold(b_update * b_update, BLOCK, FOLD), fold(b_wide * b_update, BLOCK, FOLD))


@triton.jit
def largest_update(b_a, b_b, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    """Largest |b - a| by the bits of its magnitude, where a NaN is above Inf."""
    b_bits = num.fp32_bits(b_b - b_a) & 0x7FFFFFFF
    return tl.max(tl.reshape(b_bits, [BLOCK // FOLD, FOLD]), axis=1)


@triton.jit
def nothing(RULES: tl.constexpr, OUTPUTS: tl.constexpr, UNCAST: tl.constexpr, SIZE: tl.constexpr):
    """The state before the first tile: zeros in the order that ``tile_state`` returns."""
    COUNTS: tl.constexpr = (
        len(RULES) // 2 + (2 if WANT_TRANSITIONS & OUTPUTS else 0) + (2 if WANT_NONFINITE & OUTPUTS else 0)
    )
    b_state = ()
    for _ in tl.static_range(COUNTS):
        b_state = b_state + (tl.zeros([SIZE], tl.int32),)
    if WANT_ULP & OUTPUTS:
        b_state = b_state + (tl.zeros([32], tl.int64),)
    if WANT_EXPONENTS & OUTPUTS:
        b_state = b_state + (tl.zeros([2 * EXPONENT_BINS], tl.int64),)
    if WANT_NORMS & OUTPUTS:
        for _ in tl.static_range(6 if UNCAST else 3):
            b_state = b_state + (tl.zeros([SIZE], tl.float64),)
        for _ in tl.static_range(2 if UNCAST else 1):
            b_state = b_state + (tl.zeros([SIZE], tl.int32),)
    return b_state


@triton.jit
def merge(b_state, b_more, MAXIMA: tl.constexpr):
    """Two states in one: sums, and maxima in the last MAXIMA places."""
    b_merged = ()
    for k in tl.static_range(len(b_state)):
        if k < len(b_state) - MAXIMA:
            b_merged = b_merged + (b_state[k] + b_more[k],)
        else:
            b_merged = b_merged + (tl.maximum(b_state[k], b_more[k]),)
    return b_merged


@triton.jit
def tile_state(
    p_base, p_tuned, p_mask, p_rows, p_columns, rows, columns, tile_m, tile_n,
    BASE: tl.constexpr, TUNED: tl.constexpr, ADDITIVE: tl.constexpr, UNCAST: tl.constexpr, RULES: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Reads one tile, stores its share of mask, rows and columns, and returns what is added up over tiles."""
    BLOCK: tl.constexpr = BLOCK_M * BLOCK_N
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < rows
    m_n = o_n < columns
    o_element = o_m[:, None] * columns + o_n[None, :]
    valid_rows = tl.maximum(tl.minimum(rows - tile_m * BLOCK_M, BLOCK_M), 0)
    valid = valid_rows * tl.minimum(columns - tile_n * BLOCK_N, BLOCK_N)
    # A tile past the end of a flat tensor has fewer than no columns.
    valid = tl.maximum(valid, 0)
    # Full tiles load without a mask and so by 16 bytes, whatever the number of columns of a single row.
    if valid == BLOCK:
        b_base = tl.load(p_base + o_element)
        b_tuned = tl.load(p_tuned + o_element)
    else:
        b_base = tl.load(p_base + o_element, mask=m_m[:, None] & m_n[None, :], other=0)
        b_tuned = tl.load(p_tuned + o_element, mask=m_m[:, None] & m_n[None, :], other=0)

    b_a = num.bf16_codes(b_base, BASE)
    b_b = num.bf16_codes(b_tuned, TUNED)
    b_a32 = num.to_fp32(b_base, BASE)
    b_b32 = num.to_fp32(b_tuned, TUNED)
    if ADDITIVE:
        b_b32 = num.add_fp32(b_a32, b_b32)
        b_b = num.round_to_bf16_codes(b_b32)
    m_changed = rule.changed(b_a, b_b, RULES[0], RULES[1])

    b_state = ()
    for i in tl.static_range(len(RULES) // 2):
        m_rule = rule.changed(b_a, b_b, RULES[2 * i], RULES[2 * i + 1])
        m_uncast = m_rule & (m_rule == 0)
        if UNCAST and RULES[2 * i] != rule.ULP:
            m_uncast = rule.changed_values(b_a32, b_b32, RULES[2 * i], RULES[2 * i + 1])
        b_state = b_state + (two_counts(m_rule, m_uncast, BLOCK, FOLD),)

    if WANT_MASK & OUTPUTS:
        # A byte is made inside a thread, which holds eight neighbours after 16-byte loads of 16-bit values.
        b_bits = tl.reshape(m_changed.to(tl.int32), [BLOCK_M, BLOCK_N // 8, 8]) << tl.arange(0, 8)[None, None, :]
        row_bytes = (columns + 63) // 64 * 8
        o_byte = tile_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        m_byte = m_m[:, None] & (o_byte < row_bytes)[None, :]
        p_bytes = p_mask + o_m[:, None] * row_bytes + o_byte[None, :]
        tl.store(p_bytes, tl.sum(b_bits, axis=2).to(tl.uint8), mask=m_byte)
    if WANT_ROWS & OUTPUTS:
        tl.atomic_add(p_rows + o_m, tl.sum(m_changed.to(tl.int32), axis=1).to(tl.int64), mask=m_m)
    if WANT_COLUMNS & OUTPUTS:
        tl.atomic_add(p_columns + o_n, tl.sum(m_changed.to(tl.int32), axis=0).to(tl.int64), mask=m_n)

    m_a_nan = num.is_nan_code(b_a)
    m_b_nan = num.is_nan_code(b_b)
    if WANT_TRANSITIONS & OUTPUTS:
        m_numbers = (m_a_nan | m_b_nan) == 0
        m_a_zero = (b_a & num.MAGNITUDE) == 0
        m_b_zero = (b_b & num.MAGNITUDE) == 0
        m_flip = (((b_a ^ b_b) & num.SIGN) != 0) & m_numbers & ((m_a_zero | m_b_zero) == 0)
        m_from_zero = m_a_zero & (m_b_zero == 0) & m_numbers
        m_to_zero = m_b_zero & (m_a_zero == 0) & m_numbers
        b_state = b_state + (two_counts(m_flip, m_from_zero, BLOCK, FOLD), fold(m_to_zero.to(tl.int32), BLOCK, FOLD))
    if WANT_NONFINITE & OUTPUTS:
        b_of_base = two_counts(m_a_nan, num.is_inf_code(b_a), BLOCK, FOLD)
        b_state = b_state + (b_of_base, two_counts(m_b_nan, num.is_inf_code(b_b), BLOCK, FOLD))

    # Elements outside the tensor were loaded as zeros, which all fall into the first bin of either histogram.
    outside = BLOCK - valid
    if WANT_ULP & OUTPUTS:
        b_bins = tl.histogram(tl.ravel(rule.ulp_bins(b_a, b_b)), 32).to(tl.int64)
        b_state = b_state + (b_bins - tl.where(tl.arange(0, 32) == 0, outside, 0),)
    if WANT_EXPONENTS & OUTPUTS:
        # One joint histogram of (changed, exponent) costs half of two.
        b_exponent = (b_a & num.MAGNITUDE) >> num.MANTISSA_BITS
        b_joint = tl.ravel(b_exponent + m_changed.to(tl.int32) * EXPONENT_BINS)
        b_bins = tl.histogram(b_joint, 2 * EXPONENT_BINS).to(tl.int64)
        b_state = b_state + (b_bins - tl.where(tl.arange(0, 2 * EXPONENT_BINS) == 0, outside, 0),)
    if WANT_NORMS & OUTPUTS:
        b_visible_a = num.codes_to_fp32(b_a)
        b_visible_b = num.codes_to_fp32(b_b)
        b_state = b_state + norm_sums(b_visible_a, b_visible_b, BLOCK, FOLD)
        if UNCAST:
            b_state = b_state + norm_sums(b_a32, b_b32, BLOCK, FOLD)
        b_state = b_state + (largest_update(b_visible_a, b_visible_b, BLOCK, FOLD),)
        if UNCAST:
            b_state = b_state + (largest_update(b_a32, b_b32, BLOCK, FOLD),)
    return b_state


@triton.jit
def put_two(b_slots, SLOT: tl.constexpr, b_counts):
    """``b_slots`` with the two numbers of ``two_counts`` at SLOT and SLOT + 1."""
    both = tl.sum(b_counts)
    o_slot = tl.arange(0, SLOTS)
    b_slots = tl.where(o_slot == SLOT, both & 0xFFFF, b_slots)
    return tl.where(o_slot == SLOT + 1, both >> 16, b_slots)


@triton.jit
def put_state(
    b_state, p_rules, p_counters, p_ulp, p_exponents, p_partials, program, programs,
    RULES: tl.constexpr, OUTPUTS: tl.constexpr, UNCAST: tl.constexpr,
):  # fmt: skip
    """Adds a program's counts to the results; stores its norms at ``p_partials[2 x NORMS, programs]``."""
    o_slot = tl.arange(0, SLOTS)
    b_slots = tl.zeros([SLOTS], tl.int32)
    for i in tl.static_range(len(RULES) // 2):
        b_slots = put_two(b_slots, 2 * i, b_state[i])
        if not UNCAST or RULES[2 * i] == rule.ULP:
            # The first program turns a zero into UNDEFINED, the others leave it.
            b_slots = tl.where(o_slot == 2 * i + 1, tl.where(program == 0, -1, 0), b_slots)
    AFTER_RULES: tl.constexpr = len(RULES) // 2
    AFTER_TRANSITIONS: tl.constexpr = AFTER_RULES + (2 if WANT_TRANSITIONS & OUTPUTS else 0)
    AFTER_COUNTS: tl.constexpr = AFTER_TRANSITIONS + (2 if WANT_NONFINITE & OUTPUTS else 0)
    AFTER_ULP: tl.constexpr = AFTER_COUNTS + (1 if WANT_ULP & OUTPUTS else 0)
    AFTER_HISTOGRAMS: tl.constexpr = AFTER_ULP + (1 if WANT_EXPONENTS & OUTPUTS else 0)
    if WANT_TRANSITIONS & OUTPUTS:
        b_slots = put_two(b_slots, COUNTER_SLOT, b_state[AFTER_RULES])
        b_slots = put_two(b_slots, COUNTER_SLOT + 2, b_state[AFTER_RULES + 1])
    if WANT_NONFINITE & OUTPUTS:
        b_slots = put_two(b_slots, COUNTER_SLOT + 3, b_state[AFTER_TRANSITIONS])
        b_slots = put_two(b_slots, COUNTER_SLOT + 5, b_state[AFTER_TRANSITIONS + 1])
    tl.atomic_add(p_rules + o_slot, b_slots.to(tl.int64), mask=o_slot < len(RULES))
    if (WANT_TRANSITIONS | WANT_NONFINITE) & OUTPUTS:
        o_counter = o_slot - COUNTER_SLOT
        tl.atomic_add(p_counters + o_counter, b_slots.to(tl.int64), mask=(o_counter >= 0) & (o_counter < COUNTERS))
    if WANT_ULP & OUTPUTS:
        o_bin = tl.arange(0, 32)
        b_bins = b_state[AFTER_COUNTS]
        tl.atomic_add(p_ulp + o_bin, b_bins, mask=(o_bin < ULP_BINS) & (b_bins != 0))
    if WANT_EXPONENTS & OUTPUTS:
        o_bin = tl.arange(0, 2 * EXPONENT_BINS)
        b_bins = b_state[AFTER_ULP]
        tl.atomic_add(p_exponents + o_bin % EXPONENT_BINS, b_bins, mask=b_bins != 0)
        tl.atomic_add(p_exponents + o_bin, b_bins, mask=(o_bin >= EXPONENT_BINS) & (b_bins != 0))
    if WANT_NORMS & OUTPUTS:
        LINES: tl.constexpr = 2 if UNCAST else 1
        for line in tl.static_range(LINES):
            p_line = p_partials + program + NORMS * line * programs
            for k in tl.static_range(3):
                tl.store(p_line + k * programs, tl.sum(b_state[AFTER_HISTOGRAMS + 3 * line + k]))
            largest = tl.max(b_state[AFTER_HISTOGRAMS + 3 * LINES + line])
            tl.store(p_line + 3 * programs, largest.to(tl.float32, bitcast=True).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "columns_over", "tiles", "programs"])
def tiles_kernel(
    p_base, p_tuned, p_mask, p_rows, p_columns, p_rules, p_counters, p_ulp, p_exponents, p_partials,
    rows: tl.int64, columns_over: tl.int64, tiles: tl.int64, programs: tl.int64,
    DIVISOR: tl.constexpr, BASE: tl.constexpr, TUNED: tl.constexpr, ADDITIVE: tl.constexpr, RULES: tl.constexpr,
    OUTPUTS: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    UNCAST: tl.constexpr = ADDITIVE or BASE != num.BF16 or TUNED != num.BF16
    # Neighbours that a thread has loaded, at least: 16 bytes of the narrower dtype.
    FOLD: tl.constexpr = 4 if BASE == num.FP32 and TUNED == num.FP32 else 8
    MAXIMA: tl.constexpr = 0 if not (WANT_NORMS & OUTPUTS) else 2 if UNCAST else 1
    program = tl.program_id(0).to(tl.int64)
    # A product with DIVISOR tells the compiler how row starts are aligned.
    columns = columns_over * DIVISOR
    b_state = nothing(RULES, OUTPUTS, UNCAST, BLOCK_M * BLOCK_N // FOLD)
    # One division for all steps, and none for one row: in 64 bits it takes some forty instructions.
    tile_m = program * 0 if FLAT else program * STEPS // tiles
    tile_n = program * STEPS if FLAT else program * STEPS % tiles
    for _ in range(STEPS):
        b_more = tile_state(
            p_base, p_tuned, p_mask, p_rows, p_columns, rows, columns, tile_m, tile_n,
            BASE, TUNED, ADDITIVE, UNCAST, RULES, OUTPUTS, BLOCK_M, BLOCK_N, FOLD,
        )  # fmt: skip
        b_state = merge(b_state, b_more, MAXIMA)
        tile_n += 1
        tile_m = tl.where(tile_n == tiles, tile_m + 1, tile_m)
        tile_n = tl.where(tile_n == tiles, 0, tile_n)
    put_state(b_state, p_rules, p_counters, p_ulp, p_exponents, p_partials, program, programs, RULES, OUTPUTS, UNCAST)


@triton.jit(do_not_specialize=["programs"])
def norms_kernel(p_partials, p_norms, programs: tl.int64, UNCAST: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the programs' shares, always in the same order; one program for each norm."""
    norm = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float64)
    b_largest = tl.zeros([BLOCK], tl.int64)
    start = norm * 0
    while start < programs:
        m = start + o < programs
        b_part = tl.load(p_partials + norm * programs + start + o, mask=m, other=0.0)
        b_sum += b_part
        b_largest = tl.maximum(b_largest, b_part.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF)
        start += BLOCK
    total = tl.sum(b_sum)
    if norm % NORMS == 3:
        total = tl.max(b_largest).to(tl.float64, bitcast=True)
    if not UNCAST:
        total = tl.where(norm >= NORMS, -1.0, total)
    tl.store(p_norms + norm, total)
