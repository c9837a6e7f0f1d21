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


def ordered(codes: torch.Tensor) -> torch.Tensor:
    """Codes on the ordered integer line (int32): neighbours differ by one, +0 and -0 are both 0."""
    magnitude = codes & MAGNITUDE
    return torch.where((codes & SIGN) != 0, -magnitude, magnitude)


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance in ULP (int32) between two code tensors; meaningless where either is NaN."""
    return (ordered(a) - ordered(b)).abs()
