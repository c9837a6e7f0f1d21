"""topk_svd against fp64 LAPACK, analytic matrices and its own certificate."""

from __future__ import annotations

import math

import pytest
import torch

from offprin_kernels.ops.subspace import correction, element, package, plan, solve, topk_svd
from offprin_kernels.ops.subspace.operand import Operand

SLOW, TOL = -0.4, 0.05


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_spectrum(m: int, n: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """fp64 ``[m, n]`` with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    p = values.numel()
    return (orthonormal(m, p, generator) * values) @ orthonormal(n, p, generator).T


def slow(m: int, n: int, seed: int = 0, outlier: float = 1.0) -> torch.Tensor:
    """bf16, slowly decaying as weights do, with an outlier in front where wanted."""
    values = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** SLOW
    values[0] *= outlier
    return with_spectrum(m, n, values, seed).to(torch.bfloat16)


def largest_angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Degrees between the spans of orthonormal columns, from the sine, in fp64."""
    a, b = torch.linalg.qr(a.double())[0], torch.linalg.qr(b.double())[0]
    return math.degrees(math.asin(min(1.0, float(torch.linalg.matrix_norm(b - a @ (a.T @ b), ord=2)))))


def errors(weight: torch.Tensor, found) -> tuple[float, float]:
    """(largest angle to the true subspaces in degrees, largest relative error of the values)."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    k = found.k
    angle = max(largest_angle(u[:, :k], found.U), largest_angle(vh[:k].T, found.Vh.T))
    return angle, float(((found.S - s[:k]).abs() / s[:k]).max())


@pytest.mark.parametrize("method", ["krylov", "gram", "correction", "auto"])
@pytest.mark.parametrize(("m", "n"), [(400, 400), (200, 500), (500, 200)])
@pytest.mark.parametrize("k", [3, 20])
@pytest.mark.parametrize("outlier", [1.0, 70.0])
def test_certified_angles(method: str, m: int, n: int, k: int, outlier: float) -> None:
    weight = slow(m, n, outlier=outlier)
    found = topk_svd(weight, k, method=method, tol_degrees=TOL)
    angle, values = errors(weight, found)
    assert found.converged and angle <= found.error_degrees <= TOL
    assert values < 1e-5
    assert found.U.shape == (m, k) and found.S.shape == (k,) and found.Vh.shape == (k, n)
    assert bool((found.S.diff() <= 0).all())
    eye = torch.eye(k, dtype=torch.float64)
    for basis in (found.U.double().T @ found.U.double(), found.Vh.double() @ found.Vh.double().T):
        assert torch.allclose(basis, eye, atol=5e-6)  # fp32 rows of length up to 900
    w = weight.double()
    left = (w @ found.Vh.double().T - found.U.double() * found.S).norm(dim=0)
    right = (w.T @ found.U.double() - found.Vh.double().T * found.S).norm(dim=0)
    # residuals are of the factors before they are stored: 2^-24 per entry of s u and W v
    stored = 4 * 2.0**-24 * found.S[0]
    assert bool((torch.maximum(left, right) <= found.residual * 1.01 + stored).all())


@pytest.mark.parametrize("seed", range(12))
def test_the_certificate_is_never_broken(seed: int) -> None:
    """Matrices and tolerances of all kinds, converged or not."""
    generator = torch.Generator().manual_seed(seed)
    m, n = (int(size) for size in torch.randint(80, 300, (2,), generator=generator))
    power = float(torch.rand((), generator=generator)) * 1.2
    values = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power
    weight = with_spectrum(m, n, values, seed) + 0.002 * torch.randn(m, n, generator=generator, dtype=torch.float64)
    weight = weight.to(torch.bfloat16)
    k = int(torch.randint(1, min(m, n) // 3, (), generator=generator))
    for method in ("krylov", "gram", "correction"):
        for tolerance in (3.0, 0.05, 0.001):
            found = topk_svd(weight, k, method=method, tol_degrees=tolerance, seed=seed)
            angle, _ = errors(weight, found)
            assert angle <= found.error_degrees, (method, tolerance)
            assert found.converged == (found.error_degrees <= tolerance)


def test_reference_is_lapack() -> None:
    weight = slow(60, 40)
    found = topk_svd(weight, 5, method="reference")
    s = torch.linalg.svdvals(weight.double())
    assert torch.equal(found.S, s[:5].float()) and found.gap == pytest.approx(float(s[4] - s[5]))
    assert found.converged and found.error_degrees < 1e-4


@pytest.mark.parametrize("method", ["krylov", "gram", "correction", "reference"])
def test_a_cluster_has_no_subspaces_inside(method: str) -> None:
    """Ten equal values: k = 10 is well defined, k = 5 is not, and the certificate says so."""
    weight = torch.diag(torch.cat([torch.full((10,), 2.0), torch.linspace(1, 0.5, 190)]))
    whole = topk_svd(weight, 10, method=method)
    assert whole.converged and errors(weight, whole)[0] <= whole.error_degrees
    part = topk_svd(weight, 5, method=method)
    assert not part.converged and part.error_degrees == 90 and part.gap < 1e-6
    assert torch.allclose(part.S, torch.full((5,), 2.0), rtol=1e-5)


@pytest.mark.parametrize("method", ["krylov", "gram", "correction", "auto"])
def test_rank_deficient(method: str) -> None:
    weight = with_spectrum(150, 220, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).float()
    found = topk_svd(weight, 3, method=method)
    assert found.converged and errors(weight, found)[0] <= found.error_degrees
    beyond = topk_svd(weight, 6, method=method)
    assert not beyond.converged and float(beyond.S[3:].max()) < 1e-5
    assert torch.allclose(beyond.U.T @ beyond.U, torch.eye(6), atol=1e-4)
    assert torch.allclose(beyond.Vh @ beyond.Vh.T, torch.eye(6), atol=1e-4)


def test_zero_weight() -> None:
    found = topk_svd(torch.zeros(70, 90, dtype=torch.bfloat16), 4)
    assert float(found.S.abs().max()) == 0 and not found.converged and found.error_degrees == 90
    assert bool(torch.isfinite(found.U).all()) and bool(torch.isfinite(found.Vh).all())


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (7, 5)])
def test_all_of_a_small_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    k = min(shape)
    found = topk_svd(weight, k)
    assert torch.allclose(found.S, torch.linalg.svdvals(weight.double()).float(), rtol=1e-5)
    assert torch.allclose((found.U * found.S) @ found.Vh, weight.float(), atol=1e-5)
    assert found.converged


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight = slow(200, 160).to(dtype)
    found = topk_svd(weight, 6)
    assert found.converged and errors(weight, found)[0] <= found.error_degrees and found.U.dtype == torch.float32


@pytest.mark.parametrize("power", [-100, -40, 40, 100])
def test_extreme_scales(power: int) -> None:
    """Squares of such weights overflow or vanish in fp32."""
    weight = slow(200, 160)
    scaled = torch.ldexp(weight.float(), torch.tensor(power)).to(torch.bfloat16)
    plain, found = topk_svd(weight, 6), topk_svd(scaled, 6)
    assert found.converged
    assert torch.allclose(torch.ldexp(found.S, torch.tensor(-power)), plain.S, rtol=1e-5)


def test_same_seed_same_bits() -> None:
    weight = slow(400, 300)
    a, b, other = (topk_svd(weight, 8, method="krylov", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a.U, b.U) and torch.equal(a.S, b.S) and torch.equal(a.Vh, b.Vh)
    assert not torch.equal(a.Vh, other.Vh)
    assert largest_angle(a.Vh.T, other.Vh.T) <= a.error_degrees + other.error_degrees


def test_a_batch_is_its_matrices() -> None:
    weights = torch.stack([slow(200, 120, seed) for seed in range(6)]).reshape(2, 3, 200, 120)
    found = topk_svd(weights, 5)
    assert found.U.shape == (2, 3, 200, 5) and found.error_degrees.shape == (2, 3) and found.converged
    for i in range(2):
        for j in range(3):
            one = topk_svd(weights[i, j], 5)
            assert torch.equal(found.Vh[i, j], one.Vh) and float(found.gap[i, j]) == one.gap
    again = topk_svd(weights, 5, warm_start=found)
    assert again.converged and torch.allclose(again.S, found.S, rtol=1e-5)


def test_correction_works_on_whole_batches() -> None:
    """As on a GPU: one recurrence for all matrices at once."""
    weights = torch.stack([slow(300, 260, seed, outlier=1.0 + 30 * seed) for seed in range(3)])
    found = correction.solve(Operand(weights), 6, 32, TOL, torch.Generator().manual_seed(0), None)
    assert bool((found.certificate.degrees <= TOL).all())
    for i in range(3):
        vh = torch.linalg.svd(weights[i].double(), full_matrices=False)[2]
        assert largest_angle(vh[:6].T, found.ritz.right[i, :6].T) <= float(found.certificate.degrees[i])


@pytest.mark.parametrize("together", [False, True])
def test_a_batch_tells_its_good_matrices_from_a_degenerate_one(together) -> None:
    good, flat = slow(120, 80), torch.eye(120, 80).bfloat16()
    stack = torch.stack([good, flat, slow(120, 80, seed=1)])
    if together:
        # as on a GPU
        found = package(operand := Operand(stack), solve(operand, 5, TOL, "correction", None, 0), 5, TOL)
    else:
        found = topk_svd(stack, 5, tol_degrees=TOL)
    assert not found.converged
    single = [element(found, index) for index in range(3)]
    assert [one.converged for one in single] == [True, False, True]
    assert [one.converged for one in single] == [one.error_degrees <= TOL for one in single]
    # in any shape of batch, and from a start
    again = topk_svd(stack.reshape(3, 1, 120, 80), 5, tol_degrees=TOL)
    assert [element(again, index).converged for index in range(3)] == [True, False, True]
    assert topk_svd(stack[::2], 5, tol_degrees=TOL).converged


def test_warm_start_is_cheaper_and_as_good() -> None:
    base = slow(400, 400)
    generator = torch.Generator().manual_seed(2)
    moved = torch.rand(base.shape, generator=generator) < 0.1
    step = torch.where(torch.rand(base.shape, generator=generator) < 0.5, 1, -1).to(torch.int16)
    tuned = torch.where(moved, base.view(torch.int16) + step, base.view(torch.int16)).view(torch.bfloat16)
    first = topk_svd(base, 16, tol_degrees=0.01)
    warm = topk_svd(tuned, 16, method="correction", warm_start=first)
    cold = topk_svd(tuned, 16, method="correction")
    assert warm.converged and errors(tuned, warm)[0] <= warm.error_degrees
    assert warm.iterations < cold.iterations
    unrelated = topk_svd(slow(400, 400, seed=9), 16, warm_start=first)
    assert unrelated.converged and errors(slow(400, 400, seed=9), unrelated)[0] <= unrelated.error_degrees


def test_choice_of_method() -> None:
    """Krylov for a few per cent of the vectors, Gram above; correction from a warm start and on GPUs."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert plan.choose(4096, 4096, 32, cpu).method == "krylov"
    assert plan.choose(4096, 4096, 128, cpu).method == "krylov"
    assert plan.choose(4096, 4096, 1536, cpu).method == "gram"
    assert plan.choose(2048, 2048, 512, cpu).method == "gram"
    assert plan.choose(4096, 4096, 128, cpu, warm=True).method == "correction"
    assert plan.choose(4096, 14336, 128, gpu).method == "correction"
    assert plan.choose(512, 512, 200, gpu).method == "gram"
    for m, n, k in ((4096, 4096, 128), (1024, 4096, 64), (14336, 4096, 16)):
        chosen = plan.choose(m, n, k, cpu)
        assert chosen.cost[chosen.method] == min(chosen.cost.values()) and min(chosen.cost.values()) > 0
        assert plan.choose(n, m, k, cpu).cost == chosen.cost


def test_bad_input() -> None:
    weight = slow(30, 20)
    for k in (0, -1, 21):
        with pytest.raises(ValueError, match="between 1 and min"):
            topk_svd(weight, k)
    with pytest.raises(TypeError, match="int64"):
        topk_svd(torch.ones(3, 3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="matrix"):
        topk_svd(torch.ones(3), 1)
    for tolerance in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tol_degrees"):
            topk_svd(weight, 1, tol_degrees=tolerance)
    with pytest.raises(ValueError, match="unknown method"):
        topk_svd(weight, 1, method="magic")
    with pytest.raises(ValueError, match="another shape"):
        topk_svd(weight, 1, warm_start=topk_svd(slow(20, 30), 1))
    for bad in (math.nan, math.inf, -math.inf):
        broken = weight.clone()
        broken[3, 4] = bad
        with pytest.raises(ValueError, match="1 NaN or Inf"):
            topk_svd(broken, 2)


def test_a_tolerance_below_rounding_is_refused_or_not_claimed() -> None:
    with pytest.raises(ValueError, match="the floor is 2"):
        topk_svd(slow(300, 300), 10, tol_degrees=1e-9)
    near = topk_svd(slow(300, 300), 10, tol_degrees=3e-5)
    assert errors(slow(300, 300), near)[0] <= near.error_degrees and near.converged == (near.error_degrees <= 3e-5)
