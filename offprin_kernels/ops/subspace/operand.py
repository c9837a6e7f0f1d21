"""The weight as an operator on blocks of rows, seen so that its right side is the smaller one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cached_property

import torch

from .dispatch import kernels

# Elements of a bf16 weight that are converted at once on GPUs: enough for products at full speed, little memory.
PANEL = 1 << 23


class Operand:
    """``A``: the weight or its transpose, scaled by a power of two; ``[..., M, p]`` with ``p = min(m, n)``.

    ``forward`` and ``backward`` are accurate to the working precision. ``rough_gram`` may round the block to bf16 where
    that is faster: it serves corrections, whose own error only slows convergence.

    On GPUs a bf16 weight is used as it lies there. Triton's kernels split fp32 blocks into ``pieces`` bf16 parts: three
    are as good as fp32; two have a relative error of 2.4e-6, which callers may allow. Other products convert a panel
    of the weight at a time.
    """

    def __init__(self, weight: torch.Tensor, *, precision: torch.dtype = torch.float32) -> None:
        """Raises ValueError for a weight with NaN or Inf."""
        self.weight = weight
        self.precision = precision
        self.transposed = weight.shape[-2] < weight.shape[-1]
        self.exponent = exponent_of(weight)
        found = kernels(weight.device) if weight.dtype == torch.bfloat16 else None
        self.kernels = found if precision == torch.float32 else None
        self.pieces = 3
        # an fp64 copy would be the largest thing in memory, and a few products are all that is asked of it
        in_place = found is not None or weight.device.type != "cpu" or precision == torch.float64
        self.panelled = weight.dtype == torch.bfloat16 and in_place
        plain = weight.dtype == torch.bfloat16 and self.exponent == 0
        self.rough = weight if plain and bf16_products_pay(weight.device) else None

    @cached_property
    def exact(self) -> torch.Tensor:
        """The whole weight in working precision; of a bf16 weight on a GPU, for a full SVD only."""
        return self.scaled(self.weight)

    def scaled(self, part: torch.Tensor) -> torch.Tensor:
        wide = part.to(self.precision)
        return torch.ldexp(wide, torch.tensor(-self.exponent, device=part.device)) if self.exponent else wide

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
        if self.panelled:
            return self.in_place(block, self.transposed)
        return block @ self.exact if self.transposed else from_left(self.exact, block)

    def backward(self, block: torch.Tensor) -> torch.Tensor:
        """``Y A``: ``[..., count, M]`` to ``[..., count, p]``."""
        if self.panelled:
            return self.in_place(block, not self.transposed)
        return from_left(self.exact, block) if self.transposed else block @ self.exact

    def rough_gram(self, block: torch.Tensor) -> torch.Tensor:
        """``X A^T A``, to bf16 accuracy where that is faster."""
        if self.kernels is not None and self.exponent == 0:
            there, back = (self.weight, self.weight.mT) if self.transposed else (self.weight.mT, self.weight)
            return self.kernels.product(self.kernels.product(block, there, 1, torch.bfloat16), back, 1)
        if self.rough is None:
            return self.backward(self.forward(block))
        there, back = (self.rough, self.rough.mT) if self.transposed else (self.rough.mT, self.rough)
        return ((block.bfloat16() @ there) @ back).to(block.dtype)

    def gram(self, panels: int = 4) -> torch.Tensor:
        """``A^T A`` ``[..., p, p]``; panels below the diagonal are mirrored, which saves three eighths of the work."""
        a = self.weight if self.panelled else self.exact
        a = a.mT if self.transposed else a
        if self.kernels is not None and self.exponent == 0:
            return self.kernels.product(a.mT, a, part=self.kernels.LOWER_RESULT)
        edges = [round(i * self.short / panels) for i in range(panels + 1)]
        if self.panelled:
            return self.gram_of_panels(a, edges)
        out = torch.empty((*a.shape[:-2], self.short, self.short), dtype=a.dtype, device=a.device)
        for begin, end in itertools.pairwise(edges):
            out[..., begin:, begin:end] = a[..., begin:].mT @ a[..., begin:end]
            out[..., begin:end, end:] = out[..., end:, begin:end].mT
        return out

    # ---- bf16 weights on GPUs ---------------------------------------------------------------------------------------

    def in_place(self, block: torch.Tensor, plain: bool) -> torch.Tensor:
        """``X W`` (plain) or ``X W^T``, of the weight as it lies in memory."""
        if self.kernels is not None:
            # half of the scale before and half after, so that nothing overflows or vanishes on the way
            half = -self.exponent // 2
            if self.exponent:
                block = block * 2.0**half
            out = self.kernels.product(block, self.weight if plain else self.weight.mT, self.pieces)
            return out.mul_(2.0 ** (-self.exponent - half)) if self.exponent else out
        weight, rows = flat(self.weight), flat(block)
        out = rows.new_zeros((*rows.shape[:-1], weight.shape[-1 if plain else -2]))
        for begin, end in panels_of(weight):
            panel = self.scaled(weight[:, begin:end])
            if plain:
                out.baddbmm_(rows[..., begin:end], panel)
            else:
                out[..., begin:end] = rows @ panel.mT
        return out.view(*block.shape[:-1], -1)

    def gram_of_panels(self, a: torch.Tensor, edges: list[int]) -> torch.Tensor:
        flat_a = flat(a)
        out = torch.zeros((len(flat_a), self.short, self.short), dtype=self.precision, device=a.device)
        for first, last in panels_of(flat_a):
            panel = self.scaled(flat_a[:, first:last])
            for begin, end in itertools.pairwise(edges):
                out[:, begin:, begin:end].baddbmm_(panel[..., begin:].mT, panel[..., begin:end])
        for begin, end in itertools.pairwise(edges):
            out[:, begin:end, end:] = out[:, end:, begin:end].mT
        return out.view(*a.shape[:-2], self.short, self.short)

    def random_rows(self, count: int, generator: torch.Generator, *, long: bool = False) -> torch.Tensor:
        """Gaussian rows ``[..., count, p]`` (or of length M); drawn on the CPU, so that every device starts alike."""
        shape = (*self.weight.shape[:-2], count, self.long if long else self.short)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.weight.device, self.precision)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """``[batch, r, c]``."""
    return tensor.reshape(-1, *tensor.shape[-2:])


def panels_of(weight: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows of ``[batch, r, c]`` that hold no more than PANEL elements."""
    batches, rows, columns = weight.shape
    step = max(1, PANEL // max(1, batches * columns))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


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
