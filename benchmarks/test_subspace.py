"""topk_svd, warm starts and the spectral shift on 4096 x 4096 weights, against what one would call instead."""

from __future__ import annotations

import time
from collections import defaultdict

import pytest
import torch

from offprin_kernels import base_spectrum, normalized_spectral_shift, topk_svd
from offprin_kernels.ops.subspace import blocks, operand, ritz

from .timing import interleaved, median_ratio, spread
from .weights import Truth, few_ulp, slow_weight

SIZE, TOL = 4096, 0.05
# (q - k over k, niter) of svd_lowrank, cheapest first; the first that reaches the tolerance is the peer
SETTINGS = [(1.0, 8), (1.0, 12), (1.0, 16), (1.0, 24), (2.0, 16), (1.0, 32), (2.0, 24), (1.0, 48), (2.0, 32), (2.0, 48)]


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return slow_weight(SIZE, SIZE)


@pytest.fixture(scope="module")
def tuned(weight: torch.Tensor) -> torch.Tensor:
    return few_ulp(weight)


@pytest.fixture(scope="module")
def truth(weight: torch.Tensor) -> Truth:
    return Truth.of(weight, 512)


@pytest.fixture(scope="module")
def tuned_truth(tuned: torch.Tensor) -> Truth:
    return Truth.of(tuned, 128)


def check(found, truth: Truth, tolerance: float) -> None:
    """Certified, truly so, and singular values to 1e-5."""
    k = found.k
    assert found.converged and truth.angle(found.U, found.Vh.T) <= found.error_degrees <= tolerance
    assert float(((found.S - truth.values[:k]).abs() / truth.values[:k]).max()) <= 1e-5


def cheapest_lowrank(weight: torch.Tensor, k: int, truth: Truth) -> tuple[int, int]:
    """(q, niter) of the first setting of torch.svd_lowrank that is as accurate as asked."""
    for extra, niter in SETTINGS:
        q = min(SIZE, int(k * (1 + extra)))
        torch.manual_seed(0)
        u, _, v = torch.svd_lowrank(weight.float(), q=q, niter=niter)
        if truth.angle(u[:, :k], v[:, :k]) <= TOL:
            return q, niter
    pytest.fail("no setting of svd_lowrank in the list reaches the tolerance")


@pytest.mark.parametrize(("k", "svd_bar", "peer_bar"), [(32, 30, 3), (128, 9, 5), (512, 4, 5)])
def test_cold(benchmark, record, weight, truth, k: int, svd_bar: float, peer_bar: float) -> None:
    check(topk_svd(weight, k, tol_degrees=TOL), truth, TOL)
    q, niter = cheapest_lowrank(weight, k, truth)
    seconds = interleaved(
        {
            "ours": lambda turn: topk_svd(weight, k, tol_degrees=TOL, seed=turn),
            "svd": lambda _: torch.linalg.svd(weight.float(), full_matrices=False),
            "lowrank": lambda _: torch.svd_lowrank(weight.float(), q=q, niter=niter),
        },
        rounds=3,
    )
    for peer, what, bar in (
        ("svd", "times the speed of torch.linalg.svd, fp32", svd_bar),
        ("lowrank", f"times the speed of torch.svd_lowrank(q={q}, niter={niter}), its cheapest as accurate", peer_bar),
    ):
        record(
            f"topk_svd, 4096 x 4096, k = {k}, certified to {TOL} degrees",
            median_ratio(seconds[peer], seconds["ours"]),
            bar,
            what,
            seconds=spread(seconds["ours"]),
            peer_seconds=spread(seconds[peer]),
        )
    benchmark.pedantic(topk_svd, args=(weight, k), kwargs={"tol_degrees": TOL}, rounds=3)


@pytest.mark.parametrize(("k", "bar"), [(32, 1.0), (128, 1.4)])
@pytest.mark.parametrize("solver", ["arpack", "propack"])
def test_cold_against_scipy(benchmark, record, weight, truth, k: int, bar: float, solver: str) -> None:
    from scipy.sparse.linalg import svds

    dense = weight.float().numpy()
    seconds = interleaved(
        {
            "ours": lambda turn: topk_svd(weight, k, tol_degrees=TOL, seed=turn),
            "peer": lambda turn: svds(dense, k=k, solver=solver, random_state=turn + 1),
        },
        rounds=3,
    )
    u, _, vh = svds(dense, k=k, solver=solver, random_state=0)
    error = truth.angle(torch.from_numpy(u.copy()), torch.from_numpy(vh.T.copy()))
    record(
        f"topk_svd, 4096 x 4096, k = {k}, certified to {TOL} degrees",
        median_ratio(seconds["peer"], seconds["ours"]),
        bar,
        f"times the speed of scipy's {solver.upper()} in fp32, default settings (its error: {error:.4f} degrees)",
        seconds=spread(seconds["ours"]),
        peer_seconds=spread(seconds["peer"]),
    )
    benchmark.pedantic(topk_svd, args=(weight, k), kwargs={"tol_degrees": TOL}, rounds=1)


@pytest.mark.parametrize(("k", "svd_bar"), [(32, 60), (128, 18)])
def test_warm(benchmark, record, weight, tuned, tuned_truth, k: int, svd_bar: float) -> None:
    base = topk_svd(weight, k, tol_degrees=TOL / 4)
    check(topk_svd(tuned, k, tol_degrees=TOL, warm_start=base), tuned_truth, TOL)
    seconds = interleaved(
        {
            "ours": lambda turn: topk_svd(tuned, k, tol_degrees=TOL, warm_start=base, seed=turn),
            "lowrank": lambda _: torch.svd_lowrank(tuned.float(), q=k, niter=2),
        },
        rounds=9,
    )
    svd = interleaved(
        {
            "ours": lambda turn: topk_svd(tuned, k, tol_degrees=TOL, warm_start=base, seed=turn),
            "svd": lambda _: torch.linalg.svd(tuned.float(), full_matrices=False),
        },
        rounds=3,
    )
    name = f"topk_svd from the base's space, 4096 x 4096, k = {k}, certified to {TOL} degrees"
    record(
        name,
        median_ratio(seconds["lowrank"], seconds["ours"]),
        1 / 2.2,
        f"times the speed of torch.svd_lowrank(q={k}, niter=2), whose error is tens of degrees",
        seconds=spread(seconds["ours"]),
        peer_seconds=spread(seconds["lowrank"]),
    )
    record(name, median_ratio(svd["svd"], svd["ours"]), svd_bar, "times the speed of torch.linalg.svd, fp32")
    benchmark.pedantic(topk_svd, args=(tuned, k), kwargs={"tol_degrees": TOL, "warm_start": base}, rounds=3)


def test_spectral_shift(benchmark, record, weight, tuned, truth, tuned_truth) -> None:
    base = base_spectrum(weight)
    exact = float((tuned_truth.values - truth.values).norm() / truth.values.norm())
    error = abs(normalized_spectral_shift(base, tuned).nss / exact - 1)
    assert error <= 0.006
    seconds = interleaved(
        {
            "ours": lambda _: normalized_spectral_shift(base, tuned),
            "peer": lambda _: [torch.linalg.svdvals(w.float()) for w in (weight, tuned)],
        },
        rounds=5,
    )
    record(
        "normalized_spectral_shift, 4096 x 4096, from the base's factors",
        median_ratio(seconds["peer"], seconds["ours"]),
        8,
        f"times the speed of two torch.linalg.svdvals; off by {100 * error:.2f} % of the fp64 value",
        seconds=spread(seconds["ours"]),
    )
    benchmark.pedantic(normalized_spectral_shift, args=(base, tuned), rounds=3)


def test_where_the_time_goes(benchmark, record, weight, tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large products, orthogonalisation and small dense solves; products as a share of GEMM speed beside them."""
    spent: dict[str, float] = defaultdict(float)
    work = {"operations": 0.0}

    def timed(part: str, function):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[part] += time.perf_counter() - start
            return result

        return wrapper

    def counted(function):
        def wrapper(self, block):
            work["operations"] += 2.0 * block.shape[-2] * self.long * self.short
            return function(self, block)

        return wrapper

    for name in ("forward", "backward"):
        counting = counted(getattr(operand.Operand, name))
        monkeypatch.setattr(operand.Operand, name, timed("large products", counting))
    for module in ("krylov", "correction", "polynomial", "probe", "finish", "ritz"):
        place = __import__(f"offprin_kernels.ops.subspace.{module}", fromlist=[module])
        monkeypatch.setattr(place, "orthonormalize", timed("orthogonalisation", blocks.orthonormalize), raising=False)
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, timed("small dense solves", getattr(torch.linalg, name)))
    assert ritz.rayleigh_ritz

    square = weight.float()
    start = time.perf_counter()
    topk_svd(weight, 128, tol_degrees=TOL, method="krylov")
    total = time.perf_counter() - start
    gemm = interleaved({"gemm": lambda _: square @ square}, rounds=3)["gemm"]
    peak = 2.0 * SIZE**3 / spread(gemm)["median"]
    spent["the rest, mostly projections off the basis"] = total - sum(spent.values())
    for part, seconds in spent.items():
        record(f"topk_svd, cold, k = 128: {part}", seconds / total, None, "share of the time")
    reached = work["operations"] / spent["large products"] / peak
    record(
        "topk_svd, cold, k = 128: large products",
        reached,
        None,
        "share of the speed of a 4096 x 4096 x 4096 product",
    )
    # what each part would save if it cost nothing but its products at the peak
    gains = {part: seconds / total for part, seconds in spent.items()}
    gains["large products"] *= 1 - reached
    largest = max(gains, key=lambda part: gains[part])
    record(f"topk_svd, cold, k = 128: next gain, {largest}", gains[largest], None, "of the time, at most")
    benchmark.pedantic(topk_svd, args=(weight, 128), rounds=1)
