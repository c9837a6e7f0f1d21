"""The weight as an operator on blocks of rows, seen so that its right side is the smaller one."""

from __future__ import annotations

import itertools
import math

import torch


class Operand:
    """``A``: the weight or its transpose, scaled by a power of two; ``[..., M, p]`` with ``p = min(m, n)``.

    ``forward`` and ``backward`` are accurate to the working precision. ``rough_gram`` may round the block to bf16 where
    that is faster: it serves corrections, whose own error only slows convergence.
    """

    def __init__(self, weight: torch.Tensor, *, precision: torch.dtype = torch.float32) -> None:
        """Raises ValueError for a weight with NaN or Inf."""
        self.weight = weight
        self.precision = precision
        self.transposed = weight.shape[-2] < weight.shape[-1]
        self.exponent = exponent_of(weight)
        wide = weight.to(precision)
        self.exact = torch.ldexp(wide, torch.tensor(-self.exponent, device=weight.device)) if self.exponent else wide
        plain = weight.dtype == torch.bfloat16 and self.exponent == 0
        self.rough = weight if plain and bf16_products_pay(weight.device) else None

    @property
    def long(self) -> int:
        return max(self.weight.shape[-2:])

    @property
    def short(self) -> int:
        return min(self.weight.shape[-2:])

    def widened(self) -> Operand:
        """The same weight in fp64."""
        return Operand(self.weight, precision=torch.float64)

    def forward(self, block: torch.Tensor) -> torch.Tensor:
        """``X A^T``: ``[..., count, p]`` to ``[..., count, M]``."""
        return block @ self.exact if self.transposed else from_left(self.exact, block)

    def backward(self, block: torch.Tensor) -> torch.Tensor:
        """``Y A``: ``[..., count, M]`` to ``[..., count, p]``."""
        return from_left(self.exact, block) if self.transposed else block @ self.exact

    def rough_gram(self, block: torch.Tensor) -> torch.Tensor:
        """``X A^T A``, to bf16 accuracy where that is faster."""
        if self.rough is None:
            return self.backward(self.forward(block))
        there, back = (self.rough, self.rough.mT) if self.transposed else (self.rough.mT, self.rough)
        return ((block.bfloat16() @ there) @ back).to(block.dtype)

    def gram(self, panels: int = 4) -> torch.Tensor:
        """``A^T A`` ``[..., p, p]``; panels below the diagonal are mirrored, which saves three eighths of the work."""
        a = self.exact.mT if self.transposed else self.exact
        edges = [round(i * self.short / panels) for i in range(panels + 1)]
        out = torch.empty((*a.shape[:-2], self.short, self.short), dtype=a.dtype, device=a.device)
        for begin, end in itertools.pairwise(edges):
            out[..., begin:, begin:end] = a[..., begin:].mT @ a[..., begin:end]
            out[..., begin:end, end:] = out[..., end:, begin:end].mT
        return out

    def random_rows(self, count: int, generator: torch.Generator, *, long: bool = False) -> torch.Tensor:
        """Gaussian rows ``[..., count, p]`` (or of length M); drawn on the CPU, so that every device starts alike."""
        shape = (*self.weight.shape[:-2], count, self.long if long else self.short)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.weight.device, self.precision)


def from_left(matrix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """``block @ matrix^T`` as ``(matrix @ block^T)^T``: a third faster for blocks of few rows (x86, MKL)."""
    return (matrix @ block.mT).mT


def exponent_of(weight: torch.Tensor) -> int:
    """Power of two to divide by so that squares neither overflow nor vanish; 0 for weights of ordinary size."""
    if weight.numel() == 0:
        return 0
    low, high = (float(bound) for bound in torch.aminmax(weight))
    largest = max(-low, high)
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"the weight has {bad} NaN or Inf entries; factorisations of it mean nothing, mend it first")
    return 0 if largest == 0 or 1e-6 < largest < 1e6 else math.frexp(largest)[1]


def bf16_products_pay(device: torch.device) -> bool:
    """Whether bf16 matrix products are much faster than fp32 ones: on GPUs, and on CPUs with matrix units (AMX).

    Elsewhere PyTorch emulates them, up to a thousand times slower. A property of the processor, not a measurement, so
    that results do not depend on what else the machine is doing.
    """
    if device.type != "cpu":
        return True
    # not public, and absent from some versions: then fp32 it is
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())
