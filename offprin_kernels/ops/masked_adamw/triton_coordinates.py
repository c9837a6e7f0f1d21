"""One AdamW step of a block of coordinates: what both Triton kernels of ``masked_adamw`` do, wherever they found them.

``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE constexpr.
"""

import triton
import triton.language as tl

from ... import numerics_triton as num
from .contract import Cohort, Hyper, Rounding, Slot

SLOTS, HYPERS, BIASES = tl.constexpr(len(Slot)), tl.constexpr(len(Hyper)), tl.constexpr(len(Cohort))
(SLOT_PARAM, SLOT_GRAD, SLOT_EXP_AVG, SLOT_EXP_AVG_SQ, SLOT_EXTRA, SLOT_MASK, SLOT_PREFIX, SLOT_COHORT,
 SLOT_CHANGED, SLOT_NUMEL, SLOT_OFFSET, SLOT_STREAM, SLOT_HYPER, SLOT_FIRST_COHORT) = (
    tl.constexpr(int(s)) for s in Slot)  # fmt: skip
DECAY, LERP, NEAR_GRAD, BETA2, SQUARE, EPS, SIGN, SCALE = (tl.constexpr(int(h)) for h in Hyper)
STEP_SIZE, ROOT = (tl.constexpr(int(c)) for c in Cohort)
NEAREST, STOCHASTIC, KAHAN, MASTER = (tl.constexpr(int(r)) for r in Rounding)


@triton.jit
def address(p_row, SLOT: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table; ALIGNED promises 16 bytes, without which nothing is known of it."""
    p_found = tl.load(p_row + SLOT).to(tl.pointer_type(ELEMENT))
    # Of the integer the compiler would not take it.
    return tl.multiple_of(p_found, 16) if ALIGNED else p_found


@triton.jit
def addresses(p_row, PARAM: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tensor and its state lie; bf16 as its bits."""
    VALUE: tl.constexpr = tl.int16 if PARAM == num.BF16 else tl.float32
    MOMENT: tl.constexpr = tl.int16 if STATE == num.BF16 else tl.float32
    return (
        address(p_row, SLOT_PARAM, VALUE, ALIGNED), address(p_row, SLOT_GRAD, VALUE, ALIGNED),
        address(p_row, SLOT_EXP_AVG, MOMENT, ALIGNED), address(p_row, SLOT_EXP_AVG_SQ, MOMENT, ALIGNED),
        address(p_row, SLOT_EXTRA, tl.int16, ALIGNED), address(p_row, SLOT_COHORT, tl.uint8, False),
    )  # fmt: skip


@triton.jit
def constants(p_row, p_hypers, p_cohorts):
    """What all coordinates of a tensor share: stream and offset of random numbers, bias corrections, and factors."""
    p_bias = p_cohorts + tl.load(p_row + SLOT_FIRST_COHORT) * BIASES
    p_hyper = p_hypers + tl.load(p_row + SLOT_HYPER) * HYPERS
    shared = (tl.load(p_row + SLOT_STREAM), tl.load(p_row + SLOT_OFFSET), p_bias, tl.load(p_row + SLOT_COHORT) != 0)
    bias = (tl.load(p_bias + STEP_SIZE), tl.load(p_bias + ROOT))
    factors = (
        tl.load(p_hyper + DECAY), tl.load(p_hyper + LERP), tl.load(p_hyper + NEAR_GRAD), tl.load(p_hyper + BETA2),
        tl.load(p_hyper + SQUARE), tl.load(p_hyper + EPS), tl.load(p_hyper + SIGN), tl.load(p_hyper + SCALE),
    )  # fmt: skip
    return shared, bias, factors


@triton.jit
def load(p_at, m_in, PARTIAL: tl.constexpr):
    if PARTIAL:
        b_found = tl.load(p_at, mask=m_in, other=0)
    else:
        b_found = tl.load(p_at)
    return b_found


@triton.jit
def store(p_at, b_values, m_in, PARTIAL: tl.constexpr):
    if PARTIAL:
        tl.store(p_at, b_values, mask=m_in)
    else:
        tl.store(p_at, b_values)


@triton.jit
def put_moment(p_at, b_values, m_in, STATE: tl.constexpr, PARTIAL: tl.constexpr):
    if STATE == num.BF16:
        store(p_at, num.round_to_bf16_codes(b_values).to(tl.int16), m_in, PARTIAL)
    else:
        store(p_at, b_values, m_in, PARTIAL)


@triton.jit
def advance(
    p_all, shared, bias, h, o_flat, o_entry, m_in,
    PARAM: tl.constexpr, STATE: tl.constexpr, ROUNDING: tl.constexpr, COHORTS: tl.constexpr, PARTIAL: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Steps the coordinates at ``o_flat``, whose state is at ``o_entry``; returns 1 for visible changes.

    Line for line what reference.py does. Without PARTIAL all of the block is stepped, and ``m_in`` is not looked at.
    """
    b_before = load(p_all[0] + o_flat, m_in, PARTIAL)
    b_g = num.to_fp32(load(p_all[1] + o_flat, m_in, PARTIAL), PARAM)
    b_m = num.to_fp32(load(p_all[2] + o_entry, m_in, PARTIAL), STATE)
    b_v = num.to_fp32(load(p_all[3] + o_entry, m_in, PARTIAL), STATE)
    if ROUNDING == MASTER:
        b_low = load(p_all[4] + o_entry, m_in, PARTIAL).to(tl.int32) & 0xFFFF
        b_w = num.join_master(num.bf16_codes(b_before, PARAM), b_low)
    elif ROUNDING == KAHAN:
        b_w = num.to_fp32(b_before, PARAM) + num.to_fp32(load(p_all[4] + o_entry, m_in, PARTIAL), num.BF16)
    else:
        b_w = num.to_fp32(b_before, PARAM)
    if COHORTS:
        o_cohort = o_entry * 0
        if shared[3]:
            o_cohort = load(p_all[5] + o_entry, m_in, PARTIAL).to(tl.int64)
        p_bias = shared[2] + o_cohort * BIASES
        b_step_size = tl.load(p_bias + STEP_SIZE)
        b_root = tl.load(p_bias + ROOT)
    else:
        b_step_size = bias[0]
        b_root = bias[1]

    if h[SCALE] != 1.0:
        b_g = num.div_rn(b_g, h[SCALE], PTX)
    b_g = b_g * h[SIGN]
    b_w = b_w * h[DECAY]
    b_m = num.fma(h[LERP], b_g - b_m, tl.where(h[NEAR_GRAD] != 0.0, b_g, b_m))
    b_v = num.fma(h[SQUARE] * b_g, b_g, h[BETA2] * b_v)
    b_denominator = num.div_rn(num.sqrt_rn(b_v, PTX), b_root, PTX) + h[EPS]
    b_w = b_w - num.div_rn(b_step_size * b_m, b_denominator, PTX)

    put_moment(p_all[2] + o_entry, b_m, m_in, STATE, PARTIAL)
    put_moment(p_all[3] + o_entry, b_v, m_in, STATE, PARTIAL)
    if PARAM == num.FP32:
        store(p_all[0] + o_flat, b_w, m_in, PARTIAL)
        b_after = num.round_to_bf16_codes(b_w)
    else:
        if ROUNDING == MASTER:
            b_after, b_low = num.split_master(b_w)
            store(p_all[4] + o_entry, b_low.to(tl.int16), m_in, PARTIAL)
        elif ROUNDING == STOCHASTIC:
            # 16 bits by way of int16, so that the gate against offsets in 32 bits sees none.
            b_noise = (num.splitmix64(shared[0], o_flat + shared[1]) >> 48).to(tl.uint16).to(tl.int32)
            b_after = num.round_stochastic(b_w, b_noise)
        else:
            b_after = num.round_to_bf16_codes(b_w)
        if ROUNDING == KAHAN:
            # Nothing can be kept of what overflowed.
            b_lost = tl.where(num.is_finite_code(b_after), b_w - num.codes_to_fp32(b_after), 0.0)
            store(p_all[4] + o_entry, num.round_to_bf16_codes(b_lost).to(tl.int16), m_in, PARTIAL)
        store(p_all[0] + o_flat, b_after.to(tl.int16), m_in, PARTIAL)
    b_changed = num.visibly_differ(num.bf16_codes(b_before, PARAM), b_after).to(tl.int32)
    return tl.where(m_in, b_changed, 0) if PARTIAL else b_changed
