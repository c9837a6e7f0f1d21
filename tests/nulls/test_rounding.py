"""Isotropic updates seen through bf16 rounding: against enumeration of the lattice, and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from offprin_kernels import masks, nulls, update_scan

# every non-negative bf16 value, and the one that would follow the largest
VALUES = np.append((np.arange(0x7F80, dtype=np.int32) << 16).view(np.float32).astype(np.float64), 2.0**128)
LATTICE = np.concatenate([-VALUES[:0:-1], VALUES])


def spacing(field: int) -> float:
    return 2.0 ** (max(field, 1) - 134)


def enumerated(field: int, sigma: float) -> tuple[float, float]:
    """P(change) and E(change^2), averaged over the mantissas of an exponent, from every lattice point within reach."""
    visible, energy = [], []
    for code in range(field * 128, field * 128 + 128):
        at = len(VALUES) - 1 + code
        near = LATTICE[max(0, at - 4000) : at + 4001]
        w = LATTICE[at]
        edges = (near[1:] + near[:-1]) / 2 - w
        up, down = edges[edges > 0], edges[edges < 0]
        squares = np.diff((near - w) ** 2)
        visible.append(ndtr(-up[0] / sigma) + ndtr(down[-1] / sigma))
        energy.append(squares[edges > 0] @ ndtr(-up / sigma) - squares[edges < 0] @ ndtr(down / sigma))
    return float(np.mean(visible)), float(np.mean(energy))


@pytest.mark.parametrize("field", [0, 1, 2, 118, 253, 254])
@pytest.mark.parametrize("ulps", [0.04, 0.1, 0.3, 0.7, 0.99, 1.01, 3.0, 40.0])
def test_expectations_by_enumeration(field: int, ulps: float) -> None:
    sigma = ulps * spacing(field)
    visible, energy = enumerated(field, sigma)
    assert nulls.rounding_visibility(sigma)[field] == pytest.approx(visible, rel=1e-12)
    if field < 254:  # beyond it lies Inf
        assert nulls.rounding_energy(sigma)[field] == pytest.approx(energy, rel=5e-4)


def test_expectations_far_from_the_lattice() -> None:
    sigma = 1e-3
    energy, visible = nulls.rounding_energy(sigma), nulls.rounding_visibility(sigma)
    np.testing.assert_allclose(energy[:100], sigma**2, rtol=1e-3)
    np.testing.assert_allclose(visible[:60], 1, rtol=1e-9)
    assert not energy[150:].any() and not visible[150:].any()
    assert energy[255] == visible[255] == nulls.rounding_visibility(1e60)[255] == 0
    assert np.isfinite(nulls.rounding_energy(1e-40)).all() and np.isfinite(nulls.rounding_energy(1e38)).all()


@pytest.mark.parametrize("sigma", [1e-40, 3e-12, 1e-4, 0.1, 1e5, 1e30])
def test_sigma_inverts_the_energy(sigma: float) -> None:
    for used in (slice(0, 255), slice(0, 1), slice(100, 125), slice(1, 255, 50)):
        counts = np.zeros(256, dtype=np.int64)
        counts[used] = 1000
        norm = math.sqrt(counts @ nulls.rounding_energy(sigma))
        if norm > 0:
            assert nulls.isotropic_sigma(counts, norm) == pytest.approx(sigma, rel=1e-9)


def test_limits() -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[[0, 120, 255]] = 5, 100, 2
    assert not nulls.rounding_visibility(0).any() and not nulls.rounding_energy(0).any()
    assert nulls.isotropic_sigma(counts, 0) == 0 and not nulls.isotropic_changed(counts, 0).any()
    assert nulls.isotropic_agreement(counts, 0, 0) == (0, 0)
    assert nulls.isotropic_agreement(counts, 0, 0).jaccard == 1
    assert nulls.isotropic_agreement(counts, 0, 1).jaccard == 0
    inside = nulls.isotropic_inside(counts, counts, 0)
    assert inside == (0, 0) and math.isnan(inside.overlap)
    for norm in (math.nan, math.inf):
        assert math.isnan(nulls.isotropic_sigma(counts, norm))
        assert np.isnan(nulls.isotropic_changed(counts, norm)).any()
    # nothing finite to change
    assert math.isnan(nulls.isotropic_sigma(np.eye(256)[255], 1.0))
    assert nulls.isotropic_sigma(np.zeros(256), 0.0) == 0
    # an update so small that hardly a coordinate changes, and one that drowns the weight
    assert 0 < nulls.isotropic_sigma(counts, 1e-45) < 1e-40
    assert nulls.isotropic_sigma(counts, 1e20) == pytest.approx(1e20 / math.sqrt(105), rel=1e-6)
    assert nulls.isotropic_changed(counts, 1e20) == pytest.approx(np.where(np.arange(256) < 255, counts, 0))
    with pytest.raises(ValueError, match="256"):
        nulls.isotropic_sigma(counts[:255], 1.0)


# ---- simulation -----------------------------------------------------------------------------------------------------


def weight(kind: str, size: int, rng: np.random.Generator) -> torch.Tensor:
    x = rng.standard_normal(size, dtype=np.float32)
    if kind == "narrow":
        x *= 0.003
    elif kind == "wide":
        x *= 7.0
    elif kind == "heavy":  # Student's t with two degrees of freedom
        x *= 0.02 / np.sqrt(rng.standard_exponential(size, dtype=np.float32) + 1e-9)
    elif kind == "holes":  # a fifth exact zeros, a tenth subnormal
        x *= 0.02
        x[: size // 5] = 0
        x[size // 5 : 3 * size // 10] *= 1e-38
    return torch.from_numpy(x).bfloat16()


def exponents(w: torch.Tensor, where: torch.Tensor | None = None) -> np.ndarray:
    fields = ((w.view(torch.int16) >> 7) & 0xFF).to(torch.int64)
    return torch.bincount((fields if where is None else fields[where]).flatten(), minlength=256).numpy()


def updated(w: torch.Tensor, sigma: float, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Which weights an isotropic update changed, and the norm of the change as stored."""
    noise = torch.from_numpy(rng.standard_normal(tuple(w.shape), dtype=np.float32))
    change = (w.float() + sigma * noise).bfloat16().float() - w.float()
    return change != 0, float(torch.linalg.vector_norm(change, dtype=torch.float64))


def sigma_for(counts: np.ndarray, sparsity: float) -> float:
    low, high = -60.0, 60.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        changed = counts @ nulls.rounding_visibility(2**middle) / counts.sum()
        low, high = (middle, high) if changed < 1 - sparsity else (low, middle)
    return 2.0**low


@pytest.mark.parametrize(
    ("kind", "sparsity", "size"),
    [(kind, sparsity, 1 << 20) for kind in ("narrow", "wide", "heavy", "holes") for sparsity in (0.2, 0.6, 0.9)
     if (kind, sparsity) != ("holes", 0.9)] + [("narrow", 0.99, 1 << 22), ("heavy", 0.98, 1 << 22)],
)  # fmt: skip
def test_isotropic_updates(kind: str, sparsity: float, size: int) -> None:
    rng = np.random.default_rng(17)
    w = weight(kind, size, rng)
    counts = exponents(w)
    sigma = sigma_for(counts, sparsity)
    (a, norm_a), (b, norm_b) = updated(w, sigma, rng), updated(w, 1.3 * sigma, rng)
    changed = int(a.sum())
    assert 1 - changed / size == pytest.approx(sparsity, abs=0.02)

    p = nulls.rounding_visibility(sigma)
    noise = math.sqrt(counts @ (p * (1 - p)))
    assert changed == pytest.approx(counts @ p, abs=4 * noise)
    found = nulls.isotropic_sigma(counts, norm_a)
    assert found == pytest.approx(sigma, rel=3 / math.sqrt(changed) + 1e-4)
    expected = nulls.isotropic_changed(counts, norm_a)
    # the norm is known as badly as the estimate of sigma above
    assert changed == pytest.approx(expected.sum(), abs=4 * math.hypot(noise, 0.5 * math.sqrt(changed)))
    np.testing.assert_array_equal(expected, counts * nulls.rounding_visibility(found))

    observed = int((a & b).sum()) / int((a | b).sum())
    isotropic = nulls.isotropic_agreement(counts, norm_a, norm_b)
    in_a, in_b = exponents(w, a), exponents(w, b)
    by_exponent = nulls.stratified_intersection(counts, in_a, in_b).jaccard(in_a.sum(), in_b.sum())
    assert isotropic.jaccard == pytest.approx(observed, abs=0.005)
    assert by_exponent == pytest.approx(observed, abs=0.005)
    assert isotropic.union == pytest.approx(int((a | b).sum()), rel=4 / math.sqrt(changed))


def test_holes_that_anything_fills() -> None:
    # zeros and subnormals change first: far from a sparsity of the other weights
    rng = np.random.default_rng(5)
    w = weight("holes", 1 << 20, rng)
    mask, norm = updated(w, 1e-12, rng)
    expected = nulls.isotropic_changed(exponents(w), norm)
    assert int(mask.sum()) == pytest.approx(expected.sum(), abs=30)
    assert expected[0] == exponents(w)[0]


def test_sigma_from_a_thousand_changes_is_unbiased() -> None:
    rng = np.random.default_rng(8)
    w = weight("narrow", 1 << 17, rng)
    counts = exponents(w)
    sigma = sigma_for(counts, 1 - 1000 / (1 << 17))
    draws = [updated(w, sigma, rng) for _ in range(100)]
    assert np.mean([int(mask.sum()) for mask, _ in draws]) == pytest.approx(1000, rel=0.02)
    found = np.array([nulls.isotropic_sigma(counts, norm) for _, norm in draws]) / sigma
    assert found.mean() == pytest.approx(1, abs=0.005)
    # as the docstring says: 0.5 / sqrt(1000)
    assert found.std() == pytest.approx(0.016, rel=0.3)


@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-2])
def test_overlap_with_masks_of_the_weight(relative: float) -> None:
    rng = np.random.default_rng(2)
    m, n, k = 1200, 800, 8
    u, vh = (np.linalg.qr(rng.standard_normal((size, k)))[0].astype(np.float32) for size in (m, n))
    s = np.linspace(60, 20, k, dtype=np.float32)
    w = torch.from_numpy((u * s) @ vh.T + 0.02 * rng.standard_normal((m, n), dtype=np.float32)).bfloat16()
    factors = torch.from_numpy(u), torch.from_numpy(s), torch.from_numpy(vh.T.copy())
    mask, norm = updated(w, relative * float(w.float().std()), rng)
    scan = update_scan(w, torch.where(mask, w * 2 + 1, w))
    for kept in (masks.principal_mask(factors, w.shape, 0.2), masks.low_magnitude_mask(w, 0.3)):
        seen = (kept & scan.mask).count()
        expected = nulls.isotropic_inside(exponents(w), exponents(w, kept.to_dense()), norm)
        assert seen == pytest.approx(expected.inside, abs=4 * math.sqrt(max(seen, 1)))
        assert expected.changed == pytest.approx(int(mask.sum()), abs=4 * math.sqrt(int(mask.sum())))
        assert expected.overlap == expected.inside / expected.changed
    # principal weights are large and change less, low ones more, though the update knows neither
    assert expected.overlap > 0.3
