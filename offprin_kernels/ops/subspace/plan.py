"""Which method: a cost model from operation counts and measured efficiencies, in operations of a large product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .krylov import CHEAP_CHECK, block_size, capacity, extra_rows, first_check

# Vectors that the Gram method takes along: accurate ones, so that few do.
GRAM_EXTRA = 64


@dataclass(frozen=True)
class Rates:
    """Speeds relative to a large fp32 matrix product, and eigensolvers in units of its operations.

    Measured on two AVX-512 cores with 4096 x 4096 weights (product 300 GFLOP/s).
    """

    thin: float = 0.58  # products with blocks of 16 to 64 vectors, and their reorthogonalisation
    gram: float = 0.65  # the Gram matrix
    final: float = 0.30  # the last step: products in fp32, small problems and norms in fp64
    full_eigen: float = 9.6  # times n^3: partial eigensolver of the Gram matrix, half of it memory-bound
    small_eigen: float = 13.0  # times d^3: all eigenvectors of the projected matrix


CPU = Rates()


@dataclass(frozen=True)
class Plan:
    method: str
    extra: int  # vectors of the search space beyond k
    cost: dict[str, float]  # what the choice was made from


def choose(m: int, n: int, k: int, device: torch.device, *, warm: bool = False) -> Plan:
    """The method for the top k of an m x n weight.

    On a GPU: correction, whose work is products with the whole block; the Gram matrix where the block would be half the
    space. On a CPU: correction from a warm start, else Krylov or Gram, whichever the model says is cheaper.
    """
    short, extra = min(m, n), extra_rows(k)
    rows = k + extra
    cost = {"gram": gram_cost(m, n, k, CPU)}
    if 2 * rows <= short:
        if warm or device.type != "cpu":
            cost["correction"] = correction_cost(m, n, k, rows, warm, CPU)
        if device.type == "cpu" and rows + 2 * block_size(k, short) <= capacity(k, short):
            cost["krylov"] = krylov_cost(m, n, k, rows, CPU)
    best = min(cost, key=lambda name: cost[name])
    if device.type != "cpu" and "correction" in cost:
        best = "correction"
    return Plan(best, GRAM_EXTRA if best == "gram" else extra, cost)


def gram_cost(m: int, n: int, k: int, rates: Rates) -> float:
    """Five eighths of the Gram product, the eigensolver, the final products."""
    long, short = max(m, n), min(m, n)
    rows = min(short, k + GRAM_EXTRA)
    return (
        2 * long * short**2 * 5 / 8 / rates.gram + rates.full_eigen * short**3 + 4 * long * short * rows / rates.final
    )


def krylov_cost(m: int, n: int, k: int, rows: int, rates: Rates) -> float:
    """Products and reorthogonalisation up to the first check, its eigenproblem, the final products."""
    long, short = max(m, n), min(m, n)
    block = block_size(k, short)
    dimension = min(short, k + (first_check(k) if rows + 2 * block > CHEAP_CHECK else 12) * block)
    grow = 4 * long * short * dimension + 4 * short * dimension**2
    return (
        grow / rates.thin
        + rates.small_eigen * dimension**3
        + (4 * long * short * rows + 2 * short * dimension * rows) / rates.final
    )


def correction_cost(m: int, n: int, k: int, rows: int, warm: bool, rates: Rates) -> float:
    """Per round: residual and Ritz step, 2 (degree - 1) products of the corrected rows; then the certificate."""
    long, short = max(m, n), min(m, n)
    corrected, rounds = (k + k / 8, 1) if warm else (rows, 4)
    products = 2 * rows + rounds * (rows + 7 * corrected)
    return 2 * long * short * products / (2 * rates.final)
