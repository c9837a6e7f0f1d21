"""topk_svd on a CUDA device: its own products at the measured bf16 GEMM rate, and what one would call instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from offprin_kernels import topk_svd
from offprin_kernels.ops.subspace import dispatch

from .gpu_timing import milliseconds
from .weights import Truth, few_ulp, slow_weight

SHAPE, K, TOL = (4096, 14336), 128, 0.05


@contextmanager
def counted_products() -> Iterator[list[float]]:
    """Operations of the products with the weight, one per bf16 piece of the block."""
    kernels = dispatch.kernels(torch.device("cuda"))
    if kernels is None:
        sys.exit("topk_svd has no Triton kernels here; install triton")
    plain, done = kernels.product, [0.0]

    def product(left, right, pieces=1, *rest, **options):
        done[0] += 2.0 * left.shape[-2] * left.shape[-1] * right.shape[-1] * pieces
        return plain(left, right, pieces, *rest, **options)

    kernels.product = product
    try:
        yield done
    finally:
        kernels.product = plain


def topk_rows(tflops: float) -> list[dict]:
    weight = slow_weight(SHAPE[1], SHAPE[0]).T.contiguous()
    tuned = few_ulp(weight)
    truth, after = (Truth.of(w.T.contiguous().cuda(), K) for w in (weight, tuned))
    weight, tuned = weight.cuda(), tuned.cuda()
    base = topk_svd(weight, K, tol_degrees=TOL / 4)
    found = []
    cases = {
        "cold": lambda: topk_svd(weight, K, tol_degrees=TOL),
        "warm": lambda: topk_svd(tuned, K, tol_degrees=TOL, warm_start=base),
    }
    for name, run in cases.items():
        with counted_products() as flops:
            result = run()
        known = truth if name == "cold" else after
        angle = known.angle(result.Vh.T, result.U)
        if not (result.converged and angle <= result.error_degrees):
            sys.exit(f"topk_svd ({name}): {angle} degrees off, certified {result.error_degrees}: no timing of that")
        ms = milliseconds(lambda _, run=run: run(), rounds=7)
        found.append(
            {
                "op": f"topk_svd {name}, {SHAPE[0]} x {SHAPE[1]}, k = {K}",
                "ms": ms,
                "times_own_products_at_gemm_rate": ms / (flops[0] / tflops / 1e9),
                "error_degrees": angle,
            }
        )
    wide = weight.float()
    peers = {
        "svd_lowrank(q=k, niter=2)": lambda: torch.svd_lowrank(wide, q=K, niter=2),
        "linalg.svd": lambda: torch.linalg.svd(wide, full_matrices=False),
        "linalg.eigh of the Gram matrix": lambda: torch.linalg.eigh(wide @ wide.T),
    }
    for name, run in peers.items():
        found.append({"op": f"peer: {name}", "ms": milliseconds(lambda _, run=run: run(), rounds=3)})
    return found
