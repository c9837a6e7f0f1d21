"""When a coordinate counts as changed: the Triton twins of the functions in ``reference.py``, under the same names.

``b_`` block values, ``m_`` masks, UPPER_CASE constexpr.
"""

import triton
import triton.language as tl

from ... import numerics_triton as num
from . import contract as c

BITWISE = tl.constexpr(int(c.RuleCode.BITWISE))
ULP = tl.constexpr(int(c.RuleCode.ULP))
ETA = tl.constexpr(int(c.RuleCode.ETA))
STORAGE = tl.constexpr(int(c.RuleCode.STORAGE))
ULP_NAN_BIN = tl.constexpr(c.ULP_NAN_BIN)


@triton.jit
def changed_values(b_a, b_b, CODE: tl.constexpr, THRESHOLD: tl.constexpr):
    """Which coordinates of two fp32 blocks changed; THRESHOLD holds the bits of an fp32 number."""
    if CODE == STORAGE:
        m_changed = num.fp32_bits(b_a) != num.fp32_bits(b_b)
    else:
        m_differ = b_a != b_b
        if CODE != BITWISE:
            b_limit = tl.full([1, 1], THRESHOLD, tl.int32).to(tl.float32, bitcast=True)
            if CODE == ETA:
                b_limit = b_limit * tl.maximum(tl.abs(b_a), tl.abs(b_b))
            m_infinite = (tl.abs(b_a) == float("inf")) | (tl.abs(b_b) == float("inf"))
            # Inf against anything else is a change: Inf > eta * Inf would hide it.
            m_differ = (tl.abs(b_b - b_a) > b_limit) | (m_infinite & m_differ)
        m_a_nan = b_a != b_a
        m_b_nan = b_b != b_b
        m_changed = tl.where(m_a_nan | m_b_nan, m_a_nan != m_b_nan, m_differ)
    return m_changed


@triton.jit
def changed(b_a, b_b, CODE: tl.constexpr, THRESHOLD: tl.constexpr):
    """Which coordinates of two blocks of bf16 codes changed."""
    if CODE == STORAGE:
        m_changed = b_a != b_b
    elif CODE == BITWISE or CODE == ULP:
        b_a_magnitude = b_a & num.MAGNITUDE
        b_b_magnitude = b_b & num.MAGNITUDE
        m_both_nan = tl.minimum(b_a_magnitude, b_b_magnitude) > num.INFINITY
        if CODE == BITWISE:
            m_changed = (b_a != b_b) & ((b_a_magnitude | b_b_magnitude) != 0) & (m_both_nan == 0)
        else:
            m_any_nan = tl.maximum(b_a_magnitude, b_b_magnitude) > num.INFINITY
            m_changed = tl.where(m_any_nan, m_both_nan == 0, num.ulp_distance(b_a, b_b) > THRESHOLD)
    else:
        m_changed = changed_values(num.codes_to_fp32(b_a), num.codes_to_fp32(b_b), CODE, THRESHOLD)
    return m_changed


@triton.jit
def ulp_bins(b_a, b_b):
    """Histogram bin of each coordinate's ULP distance."""
    b_distance = num.ulp_distance(b_a, b_b)
    # Distances fit fp32 exactly, so its exponent field is floor(log2) + 127.
    b_bins = (num.fp32_bits(b_distance.to(tl.float32)) >> 23) - 126
    b_bins = tl.where(b_distance == 0, 0, b_bins)
    m_a_nan = num.is_nan_code(b_a)
    m_b_nan = num.is_nan_code(b_b)
    return tl.where(m_a_nan | m_b_nan, tl.where(m_a_nan == m_b_nan, 0, ULP_NAN_BIN), b_bins)
