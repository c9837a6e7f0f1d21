"""bfloat16 arithmetic that is the same, bit for bit, on every backend: the PyTorch side.

``numerics_triton.py`` holds the Triton twin of each function, under the same name, and ``csrc/numerics.h`` the C++ one.
Everything works on *codes* (the 16 stored bits, as non-negative int32) so that no framework's own bf16 comparison,
rounding or flush-to-zero decides a result.

Source: arXiv 2511.08567, sections 2.1 and 3.6 and appendix E.
"""

from __future__ import annotations

import torch

SIGN = 0x8000
MAGNITUDE = 0x7FFF
INFINITY = 0x7F80
QUIET = 0x0040
MANTISSA_BITS = 7


def fp32_bits(x: torch.Tensor) -> torch.Tensor:
    """The 32 stored bits of an fp32 tensor as int32, any shape."""
    return x.contiguous().view(torch.int32)


def round_to_bf16_codes(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> bf16 codes (int32, 0..65535), ties to even; NaN stays NaN (quieted, sign and payload top kept)."""
    bits = fp32_bits(x).to(torch.int64) & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quieted = (bits >> 16) | QUIET
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return torch.where(is_nan, quieted, rounded).to(torch.int32)


def to_fp32(x: torch.Tensor) -> torch.Tensor:
    """bf16, fp16 or fp32 -> fp32, exact. An fp16 NaN is quieted and keeps its payload (torch's own way may not)."""
    wide = x.to(torch.float32)
    if x.dtype != torch.float16:
        return wide
    bits = x.contiguous().view(torch.int16).to(torch.int32)
    nan = ((bits & SIGN) << 16) | 0x7FC00000 | ((bits & 0x3FF) << 13)
    return torch.where(wide.isnan(), nan, fp32_bits(wide)).view(torch.float32)


def bf16_codes(x: torch.Tensor) -> torch.Tensor:
    """bf16 codes (int32, 0..65535) of a bf16, fp16 or fp32 tensor; the last two are rounded to nearest even first."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return round_to_bf16_codes(to_fp32(x))


def codes_to_fp32(codes: torch.Tensor) -> torch.Tensor:
    """bf16 codes -> their fp32 values (exact)."""
    wide = codes.to(torch.int64) << 16
    return torch.where(wide >= 1 << 31, wide - (1 << 32), wide).to(torch.int32).view(torch.float32)


def is_nan_code(codes: torch.Tensor) -> torch.Tensor:
    return (codes & MAGNITUDE) > INFINITY


def is_inf_code(codes: torch.Tensor) -> torch.Tensor:
    return (codes & MAGNITUDE) == INFINITY


def is_finite_code(codes: torch.Tensor) -> torch.Tensor:
    return (codes & MAGNITUDE) < INFINITY


def ordered(codes: torch.Tensor) -> torch.Tensor:
    """Codes on the ordered integer line (int32): neighbours differ by one, +0 and -0 are both 0."""
    magnitude = codes & MAGNITUDE
    return torch.where((codes & SIGN) != 0, -magnitude, magnitude)


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance in ULP (int32) between two code tensors; meaningless where either is NaN."""
    return (ordered(a) - ordered(b)).abs()


# ---- one rounding where two would be taken: what hardware calls fma --------------------------------------------------


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of fp32 tensors, rounded once.

    The product is exact in fp64. The sum is rounded to odd there, so that the second rounding, to fp32, is as good as
    the only one (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    # the error of that sum, exactly (Knuth's two-sum)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    inexact_and_even = (error != 0) & ((bits & 1) == 0) & total.isfinite()
    outward = (error > 0) == (total > 0)
    bits = torch.where(inexact_and_even, torch.where(outward, bits + 1, bits - 1), bits)
    return bits.view(torch.float64).float()


# ---- fp32 masters kept as a bf16 weight and its low 16 bits ----------------------------------------------------------


def split_master(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> (bf16 codes, low halves), both int32 in 0..65535; codes are x rounded to nearest, ties away from zero.

    NaN becomes the quiet NaN of its sign, whose low half is 0: any other could look like a number.
    """
    bits = fp32_bits(x).to(torch.int64) & 0xFFFFFFFF
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    bits = torch.where(is_nan, (bits & 0x80000000) | 0x7FC00000, bits)
    return ((bits + 0x8000) >> 16).to(torch.int32), (bits & 0xFFFF).to(torch.int32)


def join_master(codes: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 values that ``split_master`` took apart, exactly (NaN: quieted)."""
    wide = (codes.to(torch.int64) << 16) + low - ((low >> 15).to(torch.int64) << 16)
    return torch.where(wide >= 1 << 31, wide - (1 << 32), wide).to(torch.int32).view(torch.float32)


def round_stochastic(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 -> bf16 codes (int32), up in magnitude with the discarded fraction's probability; noise: 0..65535.

    Inf stays, NaN is quieted; values beyond the largest bf16 may become Inf, as when rounding to nearest.
    """
    bits = fp32_bits(x).to(torch.int64) & 0xFFFFFFFF
    special = (bits & 0x7F800000) == 0x7F800000
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    codes = (bits >> 16) | torch.where(is_nan, QUIET, 0)
    return torch.where(special, codes, (bits + noise) >> 16).to(torch.int32)


def visibly_differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether two bf16 codes are different values: +0 and -0 are one, and so are all NaN."""
    both_zero = ((a | b) & MAGNITUDE) == 0
    return (a != b) & ~both_zero & ~(is_nan_code(a) & is_nan_code(b))


# ---- counter-based random bits ---------------------------------------------------------------------------------------

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; constants of Vigna's public-domain version).
GAMMA = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)


def signed(x: int) -> int:
    """64 bits as the int64 that has them."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def mixed(x: int) -> int:
    """SplitMix64's output after state x, 0 <= result < 2^64."""
    z = (x + GAMMA) & ((1 << 64) - 1)
    for shift, factor in zip(SHIFTS, MIX, strict=False):
        z = (z ^ (z >> shift)) * factor & ((1 << 64) - 1)
    return z ^ (z >> SHIFTS[-1])


def splitmix64(stream: int, index: torch.Tensor) -> torch.Tensor:
    """The 64 bits (as int64) at places ``index`` (int64) of the stream that starts at state ``stream`` (int64)."""
    z = index * signed(GAMMA) + stream
    for shift, factor in zip(SHIFTS, MIX, strict=False):
        z = (z ^ shifted_right(z, shift)) * signed(factor)
    return z ^ shifted_right(z, SHIFTS[-1])


def shifted_right(z: torch.Tensor, by: int) -> torch.Tensor:
    """Of int64 taken as unsigned: zeros come in from the left."""
    return (z >> by) & ((1 << (64 - by)) - 1)
