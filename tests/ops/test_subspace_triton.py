"""The Triton kernels of topk_svd against fp64, and topk_svd through them."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from offprin_kernels.ops.subspace import blocks, correction, operand, polynomial, topk_svd, triton_launch
from offprin_kernels.ops.subspace.operand import Operand

from .test_subspace import errors, largest_angle, slow

BACKENDS = ("triton",)

# Largest error of an entry of x @ a, as a share of |x| @ |a|: what lies below the last piece, and sums in fp32 of up to
# 200 terms. Each piece has 8 bits, and its remainder a sign: 2^-9, 2^-18, 2^-27.
SUMS = 200 * 2.0**-24
BOUND = {1: 2.0**-9 + SUMS, 2: 2.0**-18 + SUMS, 3: 2.0**-27 + SUMS}
# Random errors add up like their root: Frobenius norm, relative.
TYPICAL = {1: 2e-3, 2: 3e-6, 3: 2.5e-7}


@pytest.fixture(autouse=True)
def forced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of these tests goes through the kernels."""
    monkeypatch.setenv("OFFPRIN_BACKEND", backend)


def randn(*shape: int, seed: int = 0, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def check(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, pieces: int) -> None:
    x, a = x.double(), a.double()
    exact = x @ a
    assert y.shape == exact.shape and y.dtype == torch.float32
    assert bool(((y - exact).abs() <= BOUND[pieces] * (x.abs() @ a.abs())).all())
    assert float((y - exact).norm() / exact.norm()) <= TYPICAL[pieces]


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize(("lead", "count", "m", "n"), [((), 24, 160, 96), ((2,), 5, 65, 33), ((1, 2), 16, 33, 160)])
def test_products(device, pieces: int, lead: tuple[int, ...], count: int, m: int, n: int) -> None:
    weight = randn(*lead, m, n, device=device).bfloat16()
    x, y = randn(*lead, count, m, seed=1, device=device), randn(*lead, count, n, seed=2, device=device)
    check(triton_launch.product(x, weight, pieces), x, weight, pieces)
    check(triton_launch.product(y, weight.mT, pieces), y, weight.mT, pieces)


def test_products_of_views(device) -> None:
    """Rows of a larger block, a slice of a larger weight, a weight stored by columns."""
    wide = randn(2, 70, 200, device=device).bfloat16()
    x = randn(2, 40, 70, seed=1, device=device)[:, 3:20]
    for weight in (wide[..., 8:104], wide[..., 1:98], wide.mT.contiguous().mT):
        check(triton_launch.product(x, weight), x, weight, 2)
    check(triton_launch.product(x[0].mT.contiguous().mT, wide[0]), x[0], wide[0], 2)


def test_depth_is_split_in_a_fixed_order(device) -> None:
    weight, x = randn(2100, 40, device=device).bfloat16(), randn(3, 2100, seed=1, device=device)
    launches = triton_launch.plan_product(x[None], weight[None], 2, torch.float32, "cuda")[1]
    assert len(launches) == 2 and launches[0].args["splits"] > 1
    found = triton_launch.product(x, weight)
    assert float((found - x.double() @ weight.double()).norm() / found.double().norm()) <= TYPICAL[2]
    assert torch.equal(found, triton_launch.product(x, weight))


def test_pieces_of_powers_of_two_are_exact(device) -> None:
    """x = hi + lo by construction: what two pieces hold comes out whole."""
    x = torch.tensor([[1 + 2.0**-9, 1 + 2.0**-15, -(2.0**-100), 3.0]], device=device)
    eye = torch.eye(4, dtype=torch.bfloat16, device=device)
    assert torch.equal(triton_launch.product(x, eye, 2), x)
    rounded = triton_launch.product(x, eye, 1)
    # 1 + 2^-9 is less than half way to the next bf16
    assert torch.equal(rounded, x.bfloat16().float()) and float(rounded[0, 0]) == 1.0


@pytest.mark.parametrize("shape", [(24, 160), (2, 5, 33), (70, 300), (3, 2000)])
def test_gram_and_triangular_product(device, shape: tuple[int, ...]) -> None:
    block = randn(*shape, device=device)
    gram = triton_launch.gram(block)
    exact = block.double() @ block.double().mT
    # 200 terms to a sum; longer ones are split
    scale = block.double().abs() @ block.double().abs().mT
    assert bool(((gram - exact).abs() <= BOUND[3] * scale).all())
    assert torch.equal(gram, gram.mT)
    lower = randn(*shape[:-1], shape[-2], seed=1, device=device).tril()
    check(triton_launch.lower_product(lower, block), lower, block, 3)


def test_gram_of_a_weight(device) -> None:
    for m, n in ((65, 33), (40, 96)):
        weight = randn(2, m, n, device=device).bfloat16()
        a = weight if m >= n else weight.mT
        gram = Operand(weight).gram()
        assert float((gram - a.double().mT @ a.double()).norm() / gram.double().norm()) <= TYPICAL[3]
        assert torch.equal(gram, gram.mT)


def test_orthonormal_rows(device) -> None:
    block = randn(2, 24, 90, device=device)
    block[..., 1:, :] += 10 * block[..., :1, :]
    rows = blocks.orthonormalize(block).double()
    eye = torch.eye(24, dtype=torch.float64, device=device)
    # sums of 90 terms, twice
    assert float((rows @ rows.mT - eye).abs().max()) <= 90 * 2.0**-23
    # the first j rows span what they spanned
    assert largest_angle(rows[0, :3].mT.cpu(), torch.linalg.qr(block[0, :3].double().mT)[0].cpu()) <= 1e-4


@pytest.mark.parametrize("shape", [(3, 96), (2, 5, 33), (1, 1300)])
def test_recurrence(device, shape: tuple[int, ...]) -> None:
    """In place, nothing beside it; bit for bit but for the division, which is a product with the rounded inverse."""
    image, now, force, before = (randn(*shape, seed=seed, device=device) for seed in range(4))
    rows = (*shape[:-1], 1)
    x, rho = randn(*rows, seed=5, device=device).abs() + 1, randn(*rows, seed=6, device=device).abs() / 3
    centre = randn(*shape[:-2], 1, 1, seed=7, device=device).abs() + 0.1
    q = 2 * x - rho
    expected = ((image - centre * now + force) * (2 / centre) - rho * before) / q
    kept = [tensor.clone() for tensor in (image, now, force)]
    after = triton_launch.recurrence(image, now, force, before, x, rho, centre)
    assert bool(((before - expected).abs() <= 3 * 2.0**-24 * expected.abs()).all()) and torch.equal(after, 1 / q)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((image, now, force), kept, strict=True))


def test_filter_is_the_one_of_the_cpu(device, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.stack([slow(96, 80, seed) for seed in range(2)]).to(device)
    fast = Operand(weights)
    generator = torch.Generator().manual_seed(0)
    ritz = polynomial.rayleigh_ritz(fast, blocks.orthonormalize(fast.random_rows(12, generator)))
    residual = blocks.off(ritz.residual(fast, 0, 8), ritz.right)
    found = polynomial.filtered(fast, ritz, residual, 4)
    monkeypatch.delenv("OFFPRIN_BACKEND")
    plain = Operand(weights.float())
    expected = polynomial.filtered(plain, ritz, residual, 4)
    # products in bf16: 2^-8 each, six of them
    assert plain.kernels is None and float((found - expected).norm() / expected.norm()) <= 6 * 2.0**-8


def test_nothing_is_copied_whole(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with kernels nor in panels is a weight widened, in fp32 or in fp64."""
    monkeypatch.setattr(operand, "PANEL", 700)
    weight = slow(70, 50).to(device)
    for shape in ((70, 50), (50, 70)):
        source = weight if shape == (70, 50) else weight.mT.contiguous()
        a = weight.double()
        x, y = randn(6, 50, device=device), randn(6, 70, seed=1, device=device)
        with_kernels, in_panels, wide = Operand(source), Operand(source), Operand(source).widened()
        in_panels.kernels = None
        for one, tolerance in ((with_kernels, TYPICAL[3]), (in_panels, TYPICAL[3]), (wide, 1e-15)):
            for found, exact in (
                (one.forward(x.to(one.precision)), x.double() @ a.mT),
                (one.backward(y.to(one.precision)), y.double() @ a),
                (one.gram(), a.mT @ a),
            ):
                assert found.dtype == one.precision
                assert float((found - exact).norm() / exact.norm()) <= tolerance
            assert "exact" not in one.__dict__


@pytest.mark.parametrize("power", [-100, 100])
def test_extreme_scales(device, power: int) -> None:
    weight = slow(40, 60).to(device)
    scaled = torch.ldexp(weight.float(), torch.tensor(power, device=device)).to(torch.bfloat16)
    plain, found = Operand(weight), Operand(scaled)
    shift = 2.0 ** (power - found.exponent)
    x = randn(4, 40, device=device) / 40**0.5
    assert found.exponent and torch.allclose(found.forward(x), plain.forward(x) * shift, rtol=1e-6, atol=1e-9)
    expected = plain.backward(plain.forward(x)) * shift**2
    assert torch.allclose(found.rough_gram(x), expected, rtol=1e-5, atol=1e-8)
    assert torch.allclose(found.gram(), plain.gram() * shift**2, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("m", "n", "outlier"), [(128, 96, 1.0), (96, 112, 40.0)])
def test_certified_angles(device, m: int, n: int, outlier: float) -> None:
    weight = slow(m, n, outlier=outlier)
    # a tolerance for two pieces and one for three, below what fp32 shows: the certificate may say so, and must hold
    for tolerance in (0.05, 0.002):
        found = topk_svd(weight.to(device), 4, method="correction", tol_degrees=tolerance)
        assert found.method == "correction"
        angle, values = errors(weight.to(device), found)
        assert angle <= found.error_degrees and values < 1e-5
        assert found.converged == (found.error_degrees <= tolerance) and (found.converged or tolerance < 0.05)


def test_a_batch_at_once(device) -> None:
    weights = torch.stack([slow(110, 96, seed, outlier=1.0 + 30 * seed) for seed in range(2)]).to(device)
    found = correction.solve(Operand(weights), 4, 32, 0.05, torch.Generator().manual_seed(0), None)
    assert bool((found.certificate.degrees <= 0.05).all())
    for i in range(2):
        vh = torch.linalg.svd(weights[i].double(), full_matrices=False)[2]
        assert largest_angle(vh[:4].T, found.ritz.right[i, :4].T) <= float(found.certificate.degrees[i])


@pytest.mark.parametrize("method", ["krylov", "gram", "reference"])
def test_other_methods(device, method: str) -> None:
    weight = slow(120, 100).to(device)
    found = topk_svd(weight, 3, method=method, tol_degrees=0.05)
    angle, _ = errors(weight, found)
    assert found.converged and angle <= found.error_degrees


def test_settings(backend: str) -> None:
    """A pure function of shape: powers of two, enough programs, no more splits than depth is worth."""
    for rows in (1, 16, 250, 1100):
        for columns, depth in ((4096, 14336), (28672, 8192), (33, 65)):
            for arch in ("cuda", "hip"):
                s = triton_launch.settings(rows, columns, depth, 1, (2, 0), triton_launch.ALL, True, arch)
                assert all(size >= 16 and size & (size - 1) == 0 for size in (s.block_m, s.block_n, s.block_k))
                programs = math.ceil(rows / s.block_m) * math.ceil(columns / s.block_n) * s.splits
                deep = depth // s.block_k // triton_launch.LEAST_DEPTH
                assert s.splits == 1 or (programs <= triton_launch.WAVE and s.splits <= deep)
