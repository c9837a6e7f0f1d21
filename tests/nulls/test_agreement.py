"""Null models against simulation and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from offprin_kernels import nulls


def test_published_bernoulli_values() -> None:
    # arXiv 2511.08567, Table 2: equal densities that give the printed Bernoulli values
    for printed in (0.430, 0.413, 0.467, 0.373):
        density = 2 * printed / (1 + printed)
        assert nulls.bernoulli_jaccard(density, density) == pytest.approx(printed)


def test_limits() -> None:
    assert nulls.bernoulli_jaccard(0, 0) == 1.0
    assert nulls.bernoulli_jaccard(0, 0.5) == 0.0
    assert nulls.bernoulli_jaccard(1, 1) == 1.0
    empty = nulls.stratified_intersection([0, 10], [0, 0], [0, 0])
    assert empty.jaccard(0, 0) == 1.0 and empty.z_score(0) == 0.0


def test_one_stratum_is_bernoulli() -> None:
    null = nulls.stratified_intersection([1000], [300], [200])
    assert null.mean == 60
    assert null.jaccard(300, 200) == pytest.approx(nulls.bernoulli_jaccard(0.3, 0.2))


def test_equals_the_formula_with_shares_and_densities() -> None:
    sizes, a, b = np.array([500, 300, 0, 200]), np.array([10, 200, 0, 199]), np.array([5, 250, 0, 150])
    h, p, q = sizes / sizes.sum(), a / np.maximum(sizes, 1), b / np.maximum(sizes, 1)
    want = (h * p * q).sum() / (h * (p + q - p * q)).sum()
    assert nulls.stratified_intersection(sizes, a, b).jaccard(a.sum(), b.sum()) == pytest.approx(want)


def test_mean_and_variance_by_simulation() -> None:
    rng = np.random.default_rng(0)
    sizes, a, b = [40, 100, 7], [10, 80, 7], [20, 30, 0]
    drawn = []
    for _ in range(20_000):
        total = 0
        for n, x, y in zip(sizes, a, b, strict=True):
            total += rng.hypergeometric(x, n - x, y) if y else 0
        drawn.append(total)
    null = nulls.stratified_intersection(sizes, a, b)
    assert np.mean(drawn) == pytest.approx(null.mean, abs=4 * np.sqrt(null.variance / len(drawn)))
    assert np.var(drawn) == pytest.approx(null.variance, rel=0.05)


def test_independent_votes_by_simulation() -> None:
    rng = np.random.default_rng(0)
    sizes, counts = np.array([3000, 50_000, 0]), np.array([[1500, 100, 0], [2900, 25_000, 0], [0, 40_000, 0]])
    expected = nulls.independent_votes(sizes, counts)
    assert expected.sum() == pytest.approx(53_000)
    votes = [sum((rng.random(n) < c[s] / n).astype(int) for c in counts) for s, n in enumerate(sizes) if n]
    seen = np.bincount(np.concatenate(votes), minlength=4)
    np.testing.assert_allclose(seen, expected, atol=5 * np.sqrt(53_000) / 2)
    np.testing.assert_allclose(nulls.independent_votes([10], [[5], [5]]), [2.5, 5.0, 2.5])


@pytest.mark.parametrize("clip", [False, True])
def test_margin_null_by_brute_force(clip, monkeypatch) -> None:
    rng = np.random.default_rng(3)
    masks = [rng.random((70, 40)) < 0.2 for _ in range(2)]
    if clip:  # full rows and columns make r_i c_j / p exceed 1
        masks[0][:5], masks[0][:, 3:9], masks[1][:, 5:20] = True, True, True
    p_a, p_b = (np.outer(m.mean(1), m.mean(0)) / m.mean() for m in masks)
    assert (max(p_a.max(), p_b.max()) > 1) == clip
    p_a, p_b = np.minimum(p_a, 1), np.minimum(p_b, 1)
    null = nulls.margin_null(*(m.sum(axis) for m in masks for axis in (1, 0)))
    assert null.intersection == pytest.approx((p_a * p_b).sum(), rel=1e-12)
    assert null.union == pytest.approx((p_a + p_b - p_a * p_b).sum(), rel=1e-12)
    assert null.jaccard == null.intersection / null.union


def test_margin_null_limits() -> None:
    none, some = np.zeros(3), np.array([1, 0, 2])
    assert nulls.margin_null(none, none, none, none).jaccard == 1.0
    assert nulls.margin_null(some, some, none, none) == (0.0, 3.0)
    assert nulls.margin_null([], [], [], []).jaccard == 1.0
    # a vector is its own margin
    assert nulls.margin_null([2], [1, 1, 0], [2], [0, 1, 1]) == pytest.approx((1.0, 3.0))


def test_geometry_free_masks_have_no_excess_over_the_exponent_null() -> None:
    # two random updates of equal size, seen through bf16 rounding: well above Bernoulli, explained by exponents
    import torch

    from offprin_kernels import update_scan

    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(600, 600, generator=generator) * 0.02).bfloat16()
    scans = []
    for _ in range(2):
        update = torch.randn(600, 600, generator=generator) * 2e-5
        scans.append(update_scan(base, (base.float() + update).bfloat16()))
    sizes, a = scans[0].exponent_histogram.numpy()
    b = scans[1].exponent_histogram[1].numpy()
    both = (scans[0].mask & scans[1].mask).count()
    jaccard = scans[0].mask.jaccard(scans[1].mask)
    uniform = nulls.bernoulli_jaccard(scans[0].changed / base.numel(), scans[1].changed / base.numel())
    null = nulls.stratified_intersection(sizes, a, b)
    assert jaccard > 1.5 * uniform
    assert jaccard == pytest.approx(null.jaccard(scans[0].changed, scans[1].changed), rel=0.25)
    assert abs(null.z_score(both)) < abs(
        nulls.stratified_intersection([base.numel()], [a.sum()], [b.sum()]).z_score(both)
    )
