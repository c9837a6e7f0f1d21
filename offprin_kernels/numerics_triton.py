"""bfloat16 arithmetic that is the same, bit for bit, on every backend: the Triton side of ``numerics.py``.

Blocks of bf16 and fp16 arrive as int16 and fp32 as int32 (a view made on the host), because Triton's interpreter
compares and adds bf16 on raw bit patterns and truncates fp32 to bf16, and because GPUs replace NaN payloads in
hardware conversions. Where a function has a twin in ``numerics.py`` it has the same name.

Naming law of every Triton file here: ``b_`` block values, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, UPPER_CASE
constexpr. Offsets are int64 before they are multiplied.
"""

import triton
import triton.language as tl

from . import numerics
from ._backend import interpreting

SIGN = tl.constexpr(0x8000)
MAGNITUDE = tl.constexpr(0x7FFF)
INFINITY = tl.constexpr(0x7F80)
QUIET = tl.constexpr(0x0040)
MANTISSA_BITS = tl.constexpr(7)

# Storage codes, those of update_scan/contract.py.
BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
FP32 = tl.constexpr(2)


@triton.jit
def fp32_bits(b_x):
    return b_x.to(tl.int32, bitcast=True)


@triton.jit
def round_to_bf16_codes(b_x):
    """fp32 -> bf16 codes (int32, 0..65535), to nearest even; NaN stays NaN, quieted."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_top = b_bits >> 16
    # Never overflows where it is used: only NaN patterns come within 0x8000 of 2^32.
    b_rounded = (b_bits + 0x7FFF + (b_top & 1)) >> 16
    m_nan = (b_bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(m_nan, b_top | QUIET, b_rounded).to(tl.int32)


@triton.jit
def codes_to_fp32(b_codes):
    """bf16 codes -> their fp32 values (exact)."""
    return (b_codes << 16).to(tl.float32, bitcast=True)


@triton.jit
def fp16_to_fp32(b_raw):
    """fp16 bits (int16) -> fp32, exact; by integers because hardware conversion drops NaN payloads."""
    b_bits = b_raw.to(tl.int32) & 0xFFFF
    b_magnitude = (b_bits & 0x7FFF) << 13
    # One multiplication by 2^112 moves the exponent and normalises subnormals; both are exact.
    b_scaled = fp32_bits(b_magnitude.to(tl.float32, bitcast=True) * 5.192296858534828e33)
    b_special = b_magnitude | 0x7F800000 | tl.where((b_bits & 0x3FF) != 0, 0x400000, 0)
    b_finite_or_not = tl.where((b_bits & 0x7C00) == 0x7C00, b_special, b_scaled)
    return (b_finite_or_not | ((b_bits & SIGN) << 16)).to(tl.float32, bitcast=True)


@triton.jit
def to_fp32(b_raw, DTYPE: tl.constexpr):
    """Stored bits of any of the three dtypes -> fp32, exact."""
    if DTYPE == BF16:
        b_x = codes_to_fp32(b_raw.to(tl.int32))
    elif DTYPE == FP16:
        b_x = fp16_to_fp32(b_raw)
    else:
        b_x = b_raw.to(tl.float32, bitcast=True)
    return b_x


@triton.jit
def bf16_codes(b_raw, DTYPE: tl.constexpr):
    """bf16 codes (int32, 0..65535) of stored bits; fp16 and fp32 are rounded to nearest even first."""
    if DTYPE == BF16:
        b_codes = b_raw.to(tl.int32) & 0xFFFF
    else:
        b_codes = round_to_bf16_codes(to_fp32(b_raw, DTYPE))
    return b_codes


@triton.jit
def add_fp32(b_x, b_y):
    """x + y in fp32 where a NaN operand keeps its payload (the first one's), as CPUs do and GPUs do not."""
    b_sum = fp32_bits(b_x + b_y)
    b_sum = tl.where(b_y != b_y, fp32_bits(b_y) | 0x400000, b_sum)
    b_sum = tl.where(b_x != b_x, fp32_bits(b_x) | 0x400000, b_sum)
    return b_sum.to(tl.float32, bitcast=True)


@triton.jit
def is_nan_code(b_codes):
    return (b_codes & MAGNITUDE) > INFINITY


@triton.jit
def is_inf_code(b_codes):
    return (b_codes & MAGNITUDE) == INFINITY


@triton.jit
def is_finite_code(b_codes):
    return (b_codes & MAGNITUDE) < INFINITY


@triton.jit
def ordered(b_codes):
    """Codes on the ordered integer line (int32): neighbours differ by one, +0 and -0 are both 0."""
    b_magnitude = b_codes & MAGNITUDE
    return tl.where((b_codes & SIGN) != 0, -b_magnitude, b_magnitude)


@triton.jit
def ulp_distance(b_a, b_b):
    """Distance in ULP (int32) between two blocks of codes; meaningless where either is NaN."""
    return tl.abs(ordered(b_a) - ordered(b_b))


@triton.jit
def popcount(b_x):
    """Set bits of each uint32 as int32. LLVM recognises this pattern and emits the hardware instruction."""
    b_x = b_x - ((b_x >> 1) & 0x55555555)
    b_x = (b_x & 0x33333333) + ((b_x >> 2) & 0x33333333)
    b_x = (b_x + (b_x >> 4)) & 0x0F0F0F0F
    return ((b_x * 0x01010101) >> 24).to(tl.int32)


INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def fma(b_a, b_b, b_c):
    """a * b + c of fp32, rounded once: by hardware; in fp64 where interpreted, since older interpreters round twice."""
    if INTERPRETED:
        b_product, b_addend = b_a.to(tl.float64) * b_b.to(tl.float64), b_c.to(tl.float64)
        b_total = b_product + b_addend
        # The error of that sum, exactly; rounding to odd makes the second rounding as good as the only one.
        b_back = b_total - b_product
        b_error = (b_product - (b_total - b_back)) + (b_addend - b_back)
        b_bits = b_total.to(tl.int64, bitcast=True)
        # Integers first: the interpreter keeps the type of the first, and floats have no `and`.
        m_nudged = ((b_bits & 1) == 0) & (b_error != 0.0) & (b_total - b_total == 0.0)
        b_odd = b_bits + tl.where((b_error > 0.0) == (b_total > 0.0), 1, -1)
        b_sum = tl.where(m_nudged, b_odd, b_bits).to(tl.float64, bitcast=True).to(tl.float32)
    else:
        b_sum = tl.fma(b_a, b_b, b_c)
    return b_sum


@triton.jit
def div_rn(b_x, b_y, PTX: tl.constexpr):
    """x / y of fp32, rounded to nearest even. PTX: compiled for NVIDIA, where Triton 3.4 flushes subnormals."""
    if PTX:
        b_ratio = tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [b_x, b_y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        b_ratio = tl.div_rn(b_x, b_y)
    return b_ratio


@triton.jit
def sqrt_rn(b_x, PTX: tl.constexpr):
    """sqrt(x) of fp32, rounded to nearest even. PTX: as for ``div_rn``."""
    if PTX:
        b_root = tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        # Some versions of Triton lose bits of small arguments on AMD. Powers of 4 and 2 scale exactly.
        m_small = b_x < 1e-20
        b_scaled = tl.where(m_small, b_x * 18446744073709551616.0, b_x)
        b_root = tl.sqrt_rn(b_scaled) * tl.where(m_small, 2.3283064365386963e-10, 1.0)
    return b_root


@triton.jit
def split_master(b_x):
    """fp32 -> (bf16 codes, low halves), both int32 in 0..65535; codes are rounded to nearest, ties away from zero."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    m_nan = (b_bits & 0x7FFFFFFF) > 0x7F800000
    b_bits = tl.where(m_nan, (b_bits & 0x80000000) | 0x7FC00000, b_bits)
    return ((b_bits + 0x8000) >> 16).to(tl.int32), (b_bits & 0xFFFF).to(tl.int32)


@triton.jit
def join_master(b_codes, b_low):
    """The fp32 values that ``split_master`` took apart, exactly."""
    return ((b_codes << 16) + b_low - ((b_low >> 15) << 16)).to(tl.float32, bitcast=True)


@triton.jit
def round_stochastic(b_x, b_noise):
    """fp32 -> bf16 codes (int32), up in magnitude with the discarded fraction's probability; noise: int32, 0..65535."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    m_special = (b_bits & 0x7F800000) == 0x7F800000
    m_nan = (b_bits & 0x7FFFFFFF) > 0x7F800000
    b_kept = (b_bits >> 16) | tl.where(m_nan, QUIET, 0).to(tl.uint32)
    return tl.where(m_special, b_kept, (b_bits + b_noise.to(tl.uint32)) >> 16).to(tl.int32)


@triton.jit
def visibly_differ(b_a, b_b):
    """Whether two bf16 codes are different values: +0 and -0 are one, and so are all NaN."""
    m_both_zero = ((b_a | b_b) & MAGNITUDE) == 0
    return (b_a != b_b) & ~m_both_zero & ~(is_nan_code(b_a) & is_nan_code(b_b))


GAMMA, MIX_0, MIX_1 = tl.constexpr(numerics.GAMMA), tl.constexpr(numerics.MIX[0]), tl.constexpr(numerics.MIX[1])


@triton.jit
def splitmix64(stream, b_index):
    """The 64 bits at places of the stream that starts at state ``stream`` (uint64)."""
    b_z = stream.to(tl.uint64) + b_index.to(tl.uint64) * GAMMA
    b_z = (b_z ^ (b_z >> 30)) * MIX_0
    b_z = (b_z ^ (b_z >> 27)) * MIX_1
    return b_z ^ (b_z >> 31)
