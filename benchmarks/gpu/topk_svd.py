"""topk_svd: its own products at the measured bf16 rate, and what one would call instead at the same accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from offprin_kernels import TopK, topk_svd
from offprin_kernels.ops.subspace import dispatch

from ..weights import Truth, few_ulp, slow_weight
from . import ceilings, timing

# a call reads the weight dozens of times: what the one before left in the L2 is of no matter
SHAPE, K, TOL = (4096, 14336), 128, 0.05
OF_PRODUCTS, OF_SVD, OF_LOWRANK = 2.5, 10.0, 5.0  # bars: at most so many times its products' time; so many times faster
SLOW_ROUNDS = 3  # of peers that take seconds
# (q over k, niter) of svd_lowrank, cheapest first: that of the first as accurate as asked is the time to beat
SETTINGS = ((2, 4), (2, 8), (2, 12), (2, 16), (2, 24), (3, 16), (2, 32), (3, 24), (2, 48), (3, 32), (3, 48))


@contextmanager
def counted_products(device: torch.device) -> Iterator[list[float]]:
    """Operations of the products with the weight, none where Triton does not run: an fp32 block counts once for each of
    its bf16 pieces, a product of bf16 with bf16 once, and of a symmetric one a triangle with its diagonal."""
    kernels, done = dispatch.kernels(device), [0.0]
    if kernels is None:
        yield done
        return
    plain = kernels.product

    def product(
        left: torch.Tensor, right: torch.Tensor, pieces: int = kernels.PIECES, *rest: Any, **options: Any
    ) -> torch.Tensor:
        if torch.bfloat16 in (left.dtype, right.dtype):  # the others are of blocks with themselves
            passes = 1 if left.dtype == right.dtype else pieces
            columns = right.shape[-1]
            share = (columns + 1) / (2 * columns) if options.get("part") == kernels.LOWER_RESULT else 1.0
            done[0] += 2.0 * left.shape[:-1].numel() * left.shape[-1] * columns * passes * share
        return plain(left, right, pieces, *rest, **options)

    kernels.product = product  # type: ignore[attr-defined]
    try:
        yield done
    finally:
        kernels.product = plain  # type: ignore[attr-defined]


def lowrank(weight: torch.Tensor, q: int, niter: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.svd_lowrank(weight, q=q, niter=niter)


def equally_accurate(weight: torch.Tensor, k: int, truth: Truth) -> tuple[int, int, float]:
    """q and niter of the first setting within the tolerance, and its angle; of the last one where none is."""
    q, niter, angle = 0, 0, 90.0
    for times, niter in SETTINGS:
        q = min(times * k, *weight.shape)
        u, _, v = lowrank(weight, q, niter)
        # truth is of the transposed weight: its left vectors are this one's right ones
        angle = truth.angle(v[:, :k], u[:, :k])
        if angle <= TOL:
            break
    return q, niter, angle


def run(device: str = "cuda", shape: tuple[int, int] = SHAPE, k: int = K, rounds: int = 7) -> dict:
    """The slice ``topk_svd``."""
    place = torch.device(device)
    torch.manual_seed(0)
    weight = slow_weight(shape[1], shape[0]).T.contiguous()
    tuned = few_ulp(weight)
    truth, after = (Truth.of(w.T.contiguous().to(place), k) for w in (weight, tuned))
    weight, tuned = weight.to(place), tuned.to(place)
    base = topk_svd(weight, k, tol_degrees=TOL / 4)
    cases: dict[str, tuple[Callable[[], TopK], Truth]] = {
        "cold": (lambda: topk_svd(weight, k, tol_degrees=TOL), truth),
        "warm": (lambda: topk_svd(tuned, k, tol_degrees=TOL, warm_start=base), after),
    }
    work, product = ceilings.gemm("bf16", place, min(ceilings.GEMM_SIZE, 2 * shape[0]))
    found = []
    for name, (call, known) in cases.items():
        with counted_products(place) as operations:
            result = call()
        angle = known.angle(result.Vh.T, result.U)
        error = float(((result.S.to(place).double() - known.values[:k]).abs() / known.values[:k]).max())
        # what the tests of topk_svd ask of singular values
        if not (result.converged and angle <= result.error_degrees and error <= 1e-5):
            raise RuntimeError(
                f"topk_svd ({name}): {angle} degrees off, certified {result.error_degrees}, values off by {error}"
            )
        ms = timing.turns({"ours": lambda _, call=call: call(), "product": product}, place, rounds, waiting=("ours",))  # type: ignore[misc]
        ceiling = ceilings.rate("bf16 product", work, ms["product"])
        row = timing.row(
            "topk_svd", name, "triton" if operations[0] else "torch",
            {"rows": shape[0], "columns": shape[1], "k": k, "dtype": "bfloat16", "tol_degrees": TOL}, ms["ours"],
            nbytes=2 * shape[0] * shape[1], operations=operations[0] or None,
            ceiling=ceiling if operations[0] else None, bar=1 / OF_PRODUCTS,
            error_degrees=angle, certified_degrees=result.error_degrees, method=result.method,
            iterations=result.iterations,
        )  # fmt: skip
        found.append(row)
    wide = weight.float()
    q, niter, angle = equally_accurate(wide, k, truth)
    peers: dict[str, tuple[timing.Run, float | None]] = {
        f"torch.svd_lowrank(q={q}, niter={niter}), {angle:.3f} degrees off": (
            lambda _: lowrank(wide, q, niter), OF_LOWRANK,
        ),
        "torch.linalg.svd, fp32": (lambda _: torch.linalg.svd(wide, full_matrices=False), OF_SVD),
        "torch.linalg.eigh of the Gram matrix, fp32": (lambda _: torch.linalg.eigh(wide @ wide.T), None),
    }  # fmt: skip
    for what, (peer, bar) in peers.items():
        both: dict[str, timing.Run] = {"ours": lambda _: cases["cold"][0](), "peer": peer}
        ms = timing.turns(both, place, SLOW_ROUNDS, warm_up=1, waiting=both)
        timing.compare(found[0], timing.faster(what, ms["ours"], ms["peer"], bar))
    if angle > TOL:
        found[0]["details"]["svd_lowrank"] = "no setting tried is as accurate; the ratio is a lower bound"
    return {"rows": found}
