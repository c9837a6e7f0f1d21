"""Block Krylov: Lanczos on A^T A with full reorthogonalisation. Fastest for a few per cent of the vectors on a CPU.

Sources: Golub and Underwood (1977); Musco and Musco, arXiv 1504.05477; block sizes after arXiv 2508.06486.
"""

from __future__ import annotations

import math

import torch

from .blocks import orthonormalize, spectral_norm
from .contract import Solution
from .finish import finish
from .operand import Operand
from .probe import probe

# Rows that keep more than this share of their length through a projection are orthogonal to the square root of eps.
CLEAN = torch.finfo(torch.float32).eps ** 0.5


class Lanczos:
    """An orthonormal basis ``[d, p]`` of a block Krylov space, and A^T A projected on it; grows block by block."""

    def __init__(self, operand: Operand, block: int, capacity: int, generator: torch.Generator) -> None:
        self.operand, self.block = operand, block
        self.basis = torch.empty((capacity, operand.short), dtype=operand.precision, device=operand.weight.device)
        # of which only the lower triangle is ever written or read
        self.projected = self.basis.new_empty((capacity, capacity))
        self.next = orthonormalize(operand.backward(operand.random_rows(block, generator, long=True)))
        self.coupling = self.basis.new_zeros((block, block))
        self.dimension = 0

    @property
    def full(self) -> bool:
        return self.dimension + self.block > self.basis.shape[0]

    def grow_to(self, dimension: int) -> None:
        while self.dimension < dimension and not self.full:
            self.grow()

    def grow(self) -> None:
        """One more block: two products with the weight, reorthogonalisation.

        In exact arithmetic the image meets the last two blocks only. So it is projected off these first, and off the
        whole basis second, where it meets no more than rounding.
        """
        begin, end = self.dimension, self.dimension + self.block
        self.basis[begin:end] = self.next
        basis = self.basis[:end]
        near = self.basis[max(0, begin - self.block) : end]
        image = self.operand.backward(self.operand.forward(self.next))
        along = image @ near.mT
        rest = image.addmm_(along, near, alpha=-1)
        before = rest.norm(dim=-1)
        again = rest @ basis.mT
        rest.addmm_(again, basis, alpha=-1)
        again[:, end - near.shape[0] :] += along
        self.projected[begin:end, :end] = again
        # what the second projection leaves is exact to eps of what it was given
        clean = bool((rest.norm(dim=-1) > CLEAN * before).all())
        self.next = orthonormalize(rest, basis, clean=clean)
        self.coupling = self.next @ rest.mT
        self.dimension = end

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ritz values of A^T A (fp64) and vectors as columns in the basis, both ascending."""
        d = self.dimension
        values, vectors = torch.linalg.eigh(self.projected[:d, :d])
        return values.double(), vectors

    def couplings(self, vectors: torch.Tensor, count: int) -> torch.Tensor:
        """What A^T A takes out of the space, of the first ``count`` Ritz vectors: ``[block, count]``, fp64."""
        last = vectors[self.dimension - self.block : self.dimension, -count:]
        return self.coupling.double() @ last.double()


# Up to this dimension a check costs nothing; beyond, each costs an eigenproblem, and the first waits for first_check.
CHEAP_CHECK = 400
# Each further block lowers the error about this much (measured on the same spectra).
GAIN = 2.1


def first_check(k: int) -> int:
    """Blocks beyond k after which slow spectra have converged: 26, 28, 33, 36 measured at k = 200, 256, 384, 512."""
    return round(10 + 1.15 * k**0.5)


def block_size(k: int, short: int) -> int:
    """Vectors multiplied at once: few give the best subspace per product, many run faster. Measured at 2048 to 4096."""
    return max(1, min(max(16, min(48, k // 4 // 16 * 16)), short // 4))


def extra_rows(k: int) -> int:
    """Vectors of the search space beyond k: as many again where that is cheap."""
    return max(32, min(k, 128))


def solve(operand: Operand, k: int, extra: int, tolerance: float, generator: torch.Generator) -> Solution | None:
    """Top k with ``extra`` more in the search space; None where the space grew to its limit without converging."""
    block = block_size(k, operand.short)
    limit = capacity(k, operand.short) // block * block
    rows = k + extra
    if rows + 2 * block > limit:
        return None
    lanczos = Lanczos(operand, block, limit, generator)
    target = tolerance / 3
    lanczos.grow_to(rows + 2 * block if rows + 2 * block <= CHEAP_CHECK else k + first_check(k) * block)
    while True:
        squares, vectors = lanczos.ritz()
        out = lanczos.couplings(vectors, k)
        room = (squares[-k] - squares[-rows - 1]).clamp_min(torch.finfo(torch.float64).tiny)
        estimate = float(torch.rad2deg(spectral_norm(out) / room))
        if estimate <= target or lanczos.full:
            right = orthonormalize(vectors[:, -rows:].flip(-1).mT @ lanczos.basis[: lanczos.dimension])
            found = finish(operand, right, k, lambda block: probe(operand, block, generator), tolerance)
            steps = lanczos.dimension // block
            # rounding at the gap, or no gap at all: a larger space would not help
            if bool((found[1].degrees <= tolerance).all()) or bool((found[1].rounding_degrees > tolerance).any()):
                return Solution(*found, steps, "krylov")
            if lanczos.full:
                return None
            target = min(target, estimate) / 4
        more = math.ceil(math.log(max(GAIN, min(estimate, 90.0) / target)) / math.log(GAIN))
        lanczos.grow_to(lanczos.dimension + more * block)


def capacity(k: int, short: int) -> int:
    """Largest dimension worth trying before the Gram matrix is cheaper."""
    return min(short, max(12 * k, 512))
