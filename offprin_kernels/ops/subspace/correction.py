"""Correction of a block, round by round, until its certificate holds: the method of GPUs and of warm starts."""

from __future__ import annotations

import torch

from .blocks import orthonormalize
from .contract import Solution
from .finish import finish
from .operand import Operand
from .polynomial import degree, estimate, improve
from .probe import probe
from .ritz import certify, rayleigh_ritz

MAX_ROUNDS = 12
# A round that gains less than this has met rounding.
LEAST_GAIN = 2.0
# From this many degrees on, two bf16 pieces of a block do on GPUs: their error of 2.4e-6 in what leads out of the block
# turns vectors by less than a tenth of it.
TWO_PIECES = 0.01


def solve(
    operand: Operand, k: int, extra: int, tolerance: float, generator: torch.Generator, start: torch.Tensor | None
) -> Solution:
    """Top k from a start block of rows (the search space of a related weight), or cold from a random one."""
    operand.pieces = 2 if tolerance >= TWO_PIECES else 3
    if start is None:
        block = operand.random_rows(min(operand.short, k + extra), generator)
        for _ in range(2):
            block = orthonormalize(operand.rough_gram(block))
        # nothing is converged yet: every vector is corrected
        count = block.shape[-2] - 1
    else:
        block = orthonormalize(start.to(operand.precision))
        # the rest of the block is good enough as it is
        count = min(block.shape[-2] - 1, k + max(4, k // 8))
    ritz = rayleigh_ritz(operand, block)
    target, before = tolerance, 180.0
    for rounds in range(MAX_ROUNDS + 1):
        residual = ritz.residual(operand, 0, count)
        error = float(estimate(ritz, residual, k).amax())
        if error <= target:
            rest = ritz.residual(operand, count)
            certificate = certify(ritz, torch.cat([residual, rest], -2), k, probe(operand, ritz.right, generator))
            if bool((certificate.degrees <= tolerance).all()):
                return Solution(ritz, certificate, rounds, "correction")
            # by how much the estimate was too hopeful
            target = min(target, error * tolerance / float(certificate.degrees.amax())) / 1.5
        if rounds == MAX_ROUNDS or (before < 90 and error > before / LEAST_GAIN):
            break
        before = error
        # certificates are up to three times the estimate
        ritz = improve(operand, ritz, residual, degree(ritz, k, 3 * error / target))
    operand.pieces = 3
    found = finish(operand, ritz.right, k, lambda right: probe(operand, right, generator), tolerance)
    return Solution(*found, rounds, "correction")
