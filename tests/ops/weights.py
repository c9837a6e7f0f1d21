"""Inputs for op tests: every bf16 pattern, special values, realistic weights, any dtype."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# +-0, subnormals, normals around 1, largest finite, Inf, quiet and signalling NaNs of both signs
SPECIAL_CODES = (
    0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0xBF80,
    0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF,
)  # fmt: skip


def from_codes(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.int16).view(torch.bfloat16)


def all_patterns() -> torch.Tensor:
    """All 65,536 bf16 values, in order of their codes."""
    return from_codes(torch.arange(65536))


def weights(shape, dtype=torch.bfloat16, seed: int = 0, sigma: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sigma).to(dtype)


def tuned(base: torch.Tensor, dtype=torch.bfloat16, seed: int = 1, relative: float = 2e-3) -> torch.Tensor:
    """A base moved by a fraction of a ULP or a few: some entries change in bf16, some do not."""
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    return (base.float() * (1 + relative * noise)).to(dtype)


def with_specials(tensor: torch.Tensor, seed: int, share: float = 0.2) -> torch.Tensor:
    """A copy in which a share of the entries is replaced by special values, in the tensor's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.tensor(SPECIAL_CODES)[torch.randint(len(SPECIAL_CODES), tensor.shape, generator=generator)]
    where = torch.rand(tensor.shape, generator=generator) < share
    return torch.where(where, from_codes(picks).to(tensor.dtype), tensor)


def random_bits(shape, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern at all: NaN payloads, subnormals, infinities."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(dtype)
    return torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16).view(dtype)
