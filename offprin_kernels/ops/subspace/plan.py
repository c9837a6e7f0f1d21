"""Which method: a cost model in seconds of one processor's GEMM, from operation counts and measured efficiencies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .krylov import block_size, capacity


@dataclass(frozen=True)
class Rates:
    """Speeds relative to a large fp32 matrix product. Measured on two x86 cores with 4096 x 4096 weights."""

    thin: float = 0.6  # products with a block of 16 to 64 vectors
    block: float = 0.8  # products with hundreds of vectors
    small: float = 0.12  # eigenproblems of a thousand or so
    eigen: float = 0.17  # partial symmetric eigensolver (counted as 4/3 n^3): half of it is memory-bound


CPU = Rates()


@dataclass(frozen=True)
class Plan:
    method: str
    extra: int  # vectors of the search space beyond k
    cost: dict[str, float]  # operations, in units of a large product's; what the choice was made from


def choose(m: int, n: int, k: int, device: torch.device, *, warm: bool = False) -> Plan:
    """The method for the top k of an m x n weight.

    On a GPU: correction, whose work is products with the whole block; the Gram matrix where the block would be half the
    space. On a CPU: correction from a warm start, else Krylov or Gram, whichever the model says is cheaper.
    """
    short, wide = min(m, n), k + max(32, k)
    cost = {"gram": gram_cost(m, n, k, CPU)}
    if device.type != "cpu":
        if 2 * wide > short:
            return Plan("gram", 64, cost)
        return Plan("correction", wide - k, cost | {"correction": correction_cost(m, n, k, wide, warm, CPU)})
    if 2 * wide <= short:
        if wide + 2 * block_size(k, short) <= capacity(k, short):
            cost["krylov"] = krylov_cost(m, n, k, CPU)
        if warm:
            cost["correction"] = correction_cost(m, n, k, wide, True, CPU)
    best = min(cost, key=lambda name: cost[name])
    return Plan(best, 64 if best == "gram" else wide - k, cost)


def gram_cost(m: int, n: int, k: int, rates: Rates) -> float:
    """Five eighths of the Gram product, the eigensolver, its back-transformation, and the final products."""
    long, short = max(m, n), min(m, n)
    rows = min(short, k + 64)
    product = 2 * long * short**2 * 5 / 8
    back = 2 * short**2 * rows * 2
    return product + 4 / 3 * short**3 / rates.eigen + (back + 4 * long * short * rows) / rates.block


def krylov_cost(m: int, n: int, k: int, rates: Rates) -> float:
    """A space of dimension 8 k (at least 14 blocks): products, reorthogonalisation, eigenproblem, final products."""
    long, short = max(m, n), min(m, n)
    dimension = min(short, max(8 * k, 14 * block_size(k, short)))
    rows = k + max(32, k)
    grow = 4 * long * short * dimension + 4 * short * dimension**2
    final = 4 * long * short * rows + 2 * short * dimension * rows
    return grow / rates.thin + 9 * dimension**3 / rates.small / 4 + final / rates.block


def correction_cost(m: int, n: int, k: int, rows: int, warm: bool, rates: Rates) -> float:
    """Products per round: residual and Ritz step of all rows, 2 (degree - 1) of the corrected ones."""
    long, short = max(m, n), min(m, n)
    corrected, rounds = (k + k / 8, 1) if warm else (rows, 4)
    products = 2 * rows + rounds * (2 * rows + 6 * corrected)
    return 2 * long * short * products / rates.block
