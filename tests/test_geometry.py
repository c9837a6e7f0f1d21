"""Angles, spectra, energies and bounds, against scipy, closed forms and planted rotations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from offprin_kernels import geometry as geo
from offprin_kernels.ops.subspace import topk_svd


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def slow_values(count: int, power: float = 0.4) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -power


def one_ulp_apart(base: torch.Tensor, share: float, seed: int = 0) -> torch.Tensor:
    """bf16: this share of the entries moved by one ULP, up or down."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.rand(base.shape, generator=generator) < share
    step = torch.where(torch.rand(base.shape, generator=generator) < 0.5, 1, -1).to(torch.int16)
    return (base.view(torch.int16) + step * moved).view(torch.bfloat16)


def planted(degrees: float, k: int, size: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two weights whose top-k subspaces are this far apart, left and right, in every direction."""
    u, v, s = orthonormal(size, size, seed), orthonormal(size, size, seed + 1), slow_values(size)
    s[:k] *= 1.3
    turn = torch.eye(size, dtype=torch.float64)
    c, d = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for i in range(k):
        j = size - 1 - i
        turn[i, i] = turn[j, j] = c
        turn[i, j], turn[j, i] = -d, d
    return ((u * s) @ v.T).float(), ((u @ turn * s) @ (v @ turn).T).float()


@pytest.mark.parametrize("degrees", [0.01, 0.1, 0.5, 5.0, 30.0])
def test_planted_rotations_are_found(degrees: float) -> None:
    base, tuned = planted(degrees, 8)
    found = geo.principal_angles(base, tuned, 8, tol_degrees=0.002)
    assert found.converged and found.resolution_degrees <= 0.0025
    for angles in (found.left, found.right):
        assert angles.shape == (8,)
        assert float((angles - degrees).abs().max()) <= found.resolution_degrees


def test_half_a_degree_from_a_hundred_seeds() -> None:
    for seed in range(100):
        base, tuned = planted(0.5, 16, seed=2 * seed)
        found = geo.principal_angles(base, tuned, 16, seed=seed)
        assert found.converged
        for angles in (found.left, found.right):
            assert float((angles - 0.5).abs().max()) <= min(0.025, found.resolution_degrees), seed


def test_angles_below_resolution_are_no_numbers() -> None:
    base = ((orthonormal(150, 150, 0) * slow_values(150)) @ orthonormal(150, 150, 1).T).bfloat16()
    found = geo.principal_angles(base, base.clone(), 6)
    assert bool(found.left.isnan().all()) and found.max_right is None and found.resolution_degrees > 0


def test_angles_between_agree_with_scipy() -> None:
    from scipy.linalg import subspace_angles

    a, b = orthonormal(60, 9, 0), orthonormal(60, 9, 1)
    b = a * 0.999 + b * 0.02
    b = torch.linalg.qr(b)[0]
    ours = geo.angles_between(a.T, b.T)
    theirs = np.rad2deg(subspace_angles(a.numpy(), b.numpy()))
    assert np.allclose(ours.numpy(), theirs, rtol=1e-9)
    far = orthonormal(60, 9, 2)
    assert np.allclose(geo.angles_between(a.T, far.T), np.rad2deg(subspace_angles(a.numpy(), far.numpy())), rtol=1e-9)
    # signs and rotations inside a subspace change nothing; exactly equal ones have angle 0 to fp64
    assert float(geo.angles_between(a.T, (a @ orthonormal(9, 9, 3)).T).max()) < 1e-12


def test_factors_may_stand_for_the_base() -> None:
    base, tuned = planted(1.0, 5)
    factors = topk_svd(base, 5, tol_degrees=0.005)
    found = geo.principal_angles(factors, tuned, 5)
    assert found.base is factors and found.max_left == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match="k = 5, not 4"):
        geo.principal_angles(factors, tuned, 4)


@pytest.mark.parametrize("shape", [(120, 120), (60, 150), (150, 60), (1, 40), (40, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_spectrum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = geo.spectrum(weight)
    truth = torch.linalg.svdvals(weight.double())
    assert bool(((found.values - truth).abs() <= found.error + 1e-12 * truth[0]).all())
    squares = truth**2
    assert found.stable_rank == pytest.approx(float(squares.sum() / squares[0]))
    assert geo.stable_rank(weight) == pytest.approx(found.stable_rank, rel=1e-5)


def test_spectrum_knows_what_it_cannot_tell() -> None:
    """Values below 1e-8 of the largest drown in squares; the error says so."""
    weight = torch.diag(torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64))
    found = geo.spectrum(weight)
    assert float(found.error[1]) < 1e-12 and float(found.error[2]) > 1e-9
    assert abs(float(found.values[2]) - 1e-9) <= float(found.error[2])
    zero = geo.spectrum(torch.zeros(3, 4))
    assert float(zero.values.max()) == 0 and zero.stable_rank == 0 and geo.stable_rank(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("share", [0.1, 0.001])
@pytest.mark.parametrize("shape", [(256, 256), (200, 330), (330, 200)])
def test_spectral_shift(share: float, shape: tuple[int, int]) -> None:
    size = min(shape)
    base = ((orthonormal(shape[0], size, 4) * slow_values(size)) @ orthonormal(shape[1], size, 5).T).bfloat16()
    tuned = one_ulp_apart(base, share)
    before, after = torch.linalg.svdvals(base.double()), torch.linalg.svdvals(tuned.double())
    truth = float((after - before).norm() / before.norm())
    exact = geo.normalized_spectral_shift(base, tuned)
    assert exact.exact and abs(exact.nss - truth) <= exact.error + 1e-12
    again = geo.normalized_spectral_shift(geo.spectrum(base), tuned, weight=base)
    assert again.nss == exact.nss
    first = geo.normalized_spectral_shift(geo.base_spectrum(base), tuned)
    assert not first.exact and first.nss == pytest.approx(truth, rel=0.006)
    assert truth <= exact.mirsky and exact.isotropic == pytest.approx(exact.mirsky / math.sqrt(max(shape)))
    top = geo.normalized_spectral_shift(base, tuned, k=7)
    assert top.nss == pytest.approx(float((after - before)[:7].norm() / before[:7].norm()), rel=1e-6)


def test_energy_of_known_directions() -> None:
    size, k = 80, 6
    u, v = orthonormal(size, size, 6), orthonormal(size, size, 7)
    base = ((u * slow_values(size)) @ v.T).float()
    factors = topk_svd(base, k, tol_degrees=0.001)
    inside = (u[:, :k] @ v[:, :k].T).float()
    outside = (u[:, k:] @ v[:, k:].T).float()
    within = geo.update_energy(factors, inside)
    assert within.left == pytest.approx(1) and within.right == pytest.approx(1) and within.both == pytest.approx(1)
    beyond = geo.update_energy(factors, outside)
    assert max(beyond.left, beyond.right, beyond.both) < 1e-8
    mixed = geo.update_energy(factors, (u[:, :k] @ v[:, k : 2 * k].T).float())
    assert mixed.left == pytest.approx(1) and mixed.right < 1e-8 and mixed.both < 1e-8
    noise = geo.update_energy(factors, torch.randn(size, size, generator=torch.Generator().manual_seed(8)))
    assert noise.left == pytest.approx(noise.isotropic_left, rel=0.3)
    assert noise.isotropic_both == k * k / size**2
    assert math.isnan(geo.update_energy(factors, torch.zeros(size, size)).left)


def test_bounds_hold_and_stand_beside_observations() -> None:
    size, k = 120, 4
    values = torch.cat([torch.tensor([4.0, 3.5, 3.0, 2.5]), torch.linspace(1, 0.1, size - 4)]).double()
    base = ((orthonormal(size, size, 9) * values) @ orthonormal(size, size, 10).T).float()
    tuned = base + 0.002 * torch.randn(size, size, generator=torch.Generator().manual_seed(11))
    found = geo.bounds(topk_svd(base, k), topk_svd(tuned, k), base, tuned)
    update = (tuned - base).double()
    assert found.update_spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(update, ord=2)), rel=1e-4)
    assert found.update_norm == pytest.approx(float(update.norm()), rel=1e-6)
    assert 0 < found.observed_shift <= found.weyl
    assert 0 < found.observed_degrees <= found.wedin_degrees + found.resolution_degrees and found.wedin_degrees < 10
    assert found.observed_ky_fan <= found.ky_fan
    same = geo.bounds(topk_svd(base, k), topk_svd(base, k), base, base)
    assert same.update_spectral_norm == 0 and same.observed_shift == 0


def test_bad_input() -> None:
    base, tuned = planted(1.0, 3, size=60)
    factors = topk_svd(base, 3)
    with pytest.raises(ValueError, match="must be equal"):
        geo.normalized_spectral_shift(base, tuned[:-1])
    with pytest.raises(ValueError, match="between 1 and min"):
        geo.normalized_spectral_shift(base, tuned, k=61)
    with pytest.raises(ValueError, match="weight="):
        geo.normalized_spectral_shift(geo.spectrum(base), tuned)
    with pytest.raises(ValueError, match="60 x 60"):
        geo.update_energy(factors, tuned[:, :-1])
    with pytest.raises(ValueError, match="different k"):
        geo.bounds(factors, topk_svd(tuned, 2), base, tuned)
    with pytest.raises(TypeError, match="int32"):
        geo.spectrum(torch.ones(3, 3, dtype=torch.int32))
    for shape in ((3,), (0, 4)):
        with pytest.raises(ValueError, match="matrix"):
            geo.spectrum(torch.ones(shape))
    with pytest.raises(ValueError, match="NaN or Inf"):
        geo.spectrum(torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize("shape", [(300, 200), (1100, 1300), (1700, 1100)])
@pytest.mark.parametrize("kind", ["gaussian", "sparse", "low rank"])
def test_sketch_of_an_update(shape, kind) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    update = 1e-3 * torch.randn(shape, generator=generator)
    if kind == "sparse":
        update *= torch.rand(shape, generator=generator) < 0.02
    if kind == "low rank":
        update = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    k = 32
    found = geo.update_sketch(update, k)
    values = torch.linalg.svdvals(update.double())
    energy = float(values[:k].square().sum() / values.square().sum())
    assert found.norm == pytest.approx(float(values.norm()), rel=1e-6)
    exact = min(shape) <= 1024 or kind == "low rank"
    # from a Krylov space: lower bounds, and close ones although a Gaussian's spectrum is flat
    assert (1 - (1e-5 if exact else 0.01)) * values[0] <= found.spectral_norm <= (1 + 1e-5) * values[0]
    assert (1 - (1e-5 if exact else 0.04)) * energy <= found.top_energy <= (1 + 1e-5) * energy


def test_top_shift_is_certified() -> None:
    base = one_ulp_apart((torch.randn(300, 200, generator=torch.Generator().manual_seed(3)) * 0.02).bfloat16(), 0.0)
    for share, tolerance in ((0.5, 0.05), (0.01, 1.0), (0.0, 5.0)):
        tuned, k = one_ulp_apart(base, share), 20
        update = tuned.float() - base.float()
        factors = [topk_svd(weight, k, tol_degrees=tolerance, method="krylov") for weight in (base, tuned)]
        found = geo.top_shift(*factors, float(update.norm()))
        before, after = (torch.linalg.svdvals(weight.double())[:k] for weight in (base, tuned))
        truth = float((after - before).norm() / before.norm())
        assert abs(found.nss - truth) <= found.error < 2 * (1 - math.cos(math.radians(tolerance))) + 1e-6
        assert found.nss <= found.mirsky + found.error
        assert found.mirsky == pytest.approx(float(update.norm() / before.norm()), rel=1e-6)
    draws = []
    for seed in range(20):
        noise = 1e-4 * torch.randn(300, 200, generator=torch.Generator().manual_seed(100 + seed)).double()
        after = torch.linalg.svdvals(base.double() + noise)[:k]
        draws.append(float((after - before).norm() / before.norm()) / float(noise.norm() / before.norm()))
    assert sum(draws) / 20 == pytest.approx(math.sqrt(k / (300 * 200)), rel=0.1)
    zero = torch.zeros(30, 20)
    assert math.isnan(geo.top_shift(topk_svd(zero, 3), topk_svd(zero, 3), 0.0).nss)


def test_estimated_values_serve_as_a_null() -> None:
    """Angles of an isotropic update from the search space's values, against those from all values."""
    from offprin_kernels import nulls

    m, n, k = 700, 500, 40
    weight = (orthonormal(m, n, 0) * slow_values(n) @ orthonormal(n, n, 1).mT).bfloat16()
    factors = topk_svd(weight, k, method="krylov")
    assert factors.values is None and k < len(factors.space_values) < n
    whole, norm = torch.linalg.svdvals(weight.double()), float(weight.double().norm())
    guess = geo.estimated_values(factors, norm)
    assert guess.shape == (n,) and bool((guess[:-1] >= guess[1:]).all())
    assert float(guess.norm()) == pytest.approx(norm, rel=1e-6)
    assert torch.allclose(guess[:k], whole[:k], rtol=1e-5)
    for observed, null in zip(*(nulls.isotropic_angles(v, m, n, k, 1e-3 * norm) for v in (guess, whole)), strict=True):
        assert torch.allclose(observed, null, rtol=0.05)
    gram = topk_svd(weight, k, method="gram")
    assert gram.values is None or geo.estimated_values(gram, norm) is gram.values
