"""Energy shares and angles of isotropic updates against closed forms, singular value decompositions and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from offprin_kernels import nulls
from offprin_kernels.geometry import angles_between
from offprin_kernels.nulls import spectral


@pytest.mark.parametrize(("side", "share"), [("left", 3 / 12), ("right", 3 / 8), ("both", 9 / 96)])
def test_energy_by_simulation(side, share) -> None:
    m, n, k = 12, 8, 3
    mean, variance = null = nulls.energy_null(m, n, k, side)
    law = scipy.stats.beta(share * m * n / 2, (1 - share) * m * n / 2)
    assert mean == pytest.approx(law.mean(), rel=1e-12) and variance == pytest.approx(law.var(), rel=1e-12)
    d = np.random.default_rng(0).standard_normal((20_000, m, n))
    inside = {"left": d[:, :k], "right": d[:, :, :k], "both": d[:, :k, :k]}[side]
    drawn = (inside**2).sum((1, 2)) / (d**2).sum((1, 2))
    assert drawn.mean() == pytest.approx(mean, abs=4 * math.sqrt(variance / len(drawn)))
    assert drawn.var() == pytest.approx(variance, rel=0.05)
    assert null.z_score(mean + 2 * math.sqrt(variance)) == pytest.approx(2)


def test_energy_limits() -> None:
    assert nulls.energy_null(5, 9, 5, "left") == (1, 0)
    assert nulls.energy_null(5, 9, 5, "left").z_score(1.0) == 0
    assert nulls.energy_null(5, 9, 5, "both").mean == pytest.approx(5 / 9)
    assert math.isnan(nulls.energy_null(5, 9, 2, "both").z_score(math.nan))
    with pytest.raises(ValueError, match="side"):
        nulls.energy_null(5, 9, 2, "top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must lie"):
        nulls.energy_null(5, 9, 6, "left")


# ---- angles ---------------------------------------------------------------------------------------------------------

SHAPES = [(90, 60, 8), (60, 90, 20), (70, 70, 1), (70, 70, 60), (100, 40, 40), (50, 130, 40)]


def weight(m: int, n: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """A weight with a slowly falling spectrum: itself, full U, its values, full V^T."""
    w = torch.from_numpy(rng.standard_normal((m, n)) * (1 + np.arange(n)) ** -0.3)
    return w, *torch.linalg.svd(w)


def true_angles(u, vh, tuned: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    after = torch.linalg.svd(tuned, full_matrices=False)
    return angles_between(u[:, :k].mT, after[0][:, :k].mT), angles_between(vh[:k], after[2][:k])


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("window", [0, 32])
def test_couplings_of_one_update(m: int, n: int, k: int, window: int) -> None:
    rng = np.random.default_rng(4)
    w, u, s, vh = weight(m, n, rng)
    d = torch.from_numpy(rng.standard_normal((m, n)))
    sigma, p = 1e-6, min(m, n)
    inner = (u.mT @ d @ vh.mT).numpy()
    h = min(k, p - k, window)
    near = slice(k - h, k + h)
    a, b = inner[k:p, :k].astype(np.float32), inner[:k, k:p].T.astype(np.float32)
    left, right = spectral.couplings(s.numpy() / s[0].item(), sigma / s[0].item(), a, b, inner[near, near])
    outside = inner[p:, :k] * sigma / s[:k].numpy(), inner[:k, p:].T * sigma / s[:k].numpy()
    truth = true_angles(u, vh, w + sigma * d, k)
    for want, coupling, beyond in zip(truth, (left, right), outside, strict=True):
        angles = np.degrees(np.arctan(np.linalg.svd(np.vstack([coupling, beyond]))[1]))
        seen = np.zeros(k)
        seen[: len(angles)] = angles[:k]
        np.testing.assert_allclose(seen, want.numpy(), rtol=2e-3, atol=1e-8)


def test_the_exact_window_helps_where_gaps_are_small() -> None:
    rng = np.random.default_rng(1)
    m, n, k, sigma = 80, 60, 12, 0.03
    w, u, s, vh = weight(m, n, rng)
    errors = {0: [], 32: []}
    for _ in range(40):
        d = torch.from_numpy(rng.standard_normal((m, n)))
        inner = (u.mT @ d @ vh.mT).numpy()
        want = true_angles(u, vh, w + sigma * d, k)[1][0]
        for window, found in errors.items():
            near = slice(k - min(k, window), k + min(k, window))
            a, b = inner[k:n, :k].astype(np.float32), inner[:k, k:].T.astype(np.float32)
            right = spectral.couplings(s.numpy(), sigma, a, b, inner[near, near])[1]
            found.append(abs(np.degrees(np.arctan(np.linalg.norm(right, 2))) / want - 1))
    assert np.median(errors[32]) < 0.5 * np.median(errors[0])
    assert np.median(errors[32]) < 0.05


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_angles_are_distributed_as_those_of_an_svd(m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(6)
    w, u, s, vh = weight(m, n, rng)
    norm = 2e-4 * float(w.norm())
    drawn, seen = [], []
    for seed in range(60):
        d = torch.from_numpy(rng.standard_normal((m, n))) * norm / math.sqrt(m * n)
        seen.append(torch.stack(true_angles(u, vh, w + d, k)))
        drawn.append(torch.stack(nulls.isotropic_angles(s, m, n, k, norm, seed)))
    # largest, mean and median angle of either side, in logarithms, for single draws scatter by factors
    stats = [
        torch.stack([torch.log(x.clamp(min=1e-9)) for x in (y[..., 0], y.mean(-1), y.median(-1).values)])
        for y in (torch.stack(drawn), torch.stack(seen))
    ]
    error = torch.sqrt((stats[0].var(1) + stats[1].var(1)) / len(seen))
    assert ((stats[0].mean(1) - stats[1].mean(1)).abs() <= 4 * error + 1e-9).all()


def test_angles_scale_and_repeat() -> None:
    s = torch.linspace(3, 1, 40).double()
    small, large = (nulls.isotropic_angles(s, 40, 70, 5, norm, seed=3) for norm in (1e-6, 1e-5))
    for a, b, again in zip(small, large, nulls.isotropic_angles(s, 40, 70, 5, 1e-6, seed=3), strict=True):
        torch.testing.assert_close(10 * a, b, rtol=1e-4, atol=0)
        assert torch.equal(a, again) and a.dtype == torch.float64 and (a.diff() <= 0).all()
    assert not torch.equal(small[0], nulls.isotropic_angles(s, 40, 70, 5, 1e-6, seed=4)[0])
    # the unit of the weight does not matter
    tiny = nulls.isotropic_angles(s * 1e-30, 40, 70, 5, 1e-36, seed=3)
    torch.testing.assert_close(tiny[1], small[1], rtol=1e-4, atol=0)


def test_the_triangle_stands_for_all_rows() -> None:
    rng = np.random.default_rng(0)
    for rows in (3, 6, 40):
        norms = [[np.linalg.norm(x, 2), np.linalg.norm(x)] for x in
                 (spectral.gaussian_triangle(rng, rows, 6) for _ in range(2000))]  # fmt: skip
        want = [[np.linalg.norm(x, 2), np.linalg.norm(x)] for x in rng.standard_normal((2000, rows, 6))]
        np.testing.assert_allclose(np.mean(norms, 0), np.mean(want, 0), rtol=0.01)
    assert spectral.gaussian_triangle(rng, 40, 6).shape == (6, 6)


@pytest.mark.parametrize(("above", "below"), [(1, 1), (3, 2), (2, 5)])
def test_ties_are_unresolved(above: int, below: int) -> None:
    s = torch.linspace(2, 1, 30).double()
    s[10 - above : 10 + below] = s[10 - above]
    with np.errstate(all="raise"):
        left, right = nulls.isotropic_angles(s, 30, 45, 10, 1e-3)
    tied = min(above, below)
    for angles in (left, right):
        assert (angles[:tied] == 90).all() and (angles[tied:] < 5).all() and (angles > 0).all()


def test_limits() -> None:
    s = torch.linspace(2, 1, 6).double()
    with np.errstate(all="raise"):
        for angles in nulls.isotropic_angles(s, 6, 9, 3, 0.0):
            assert torch.equal(angles, torch.zeros(3).double())
        for bad in (math.nan, math.inf):
            assert all(angles.isnan().all() for angles in nulls.isotropic_angles(s, 6, 9, 3, bad))
        assert all(angles.isnan().all() for angles in nulls.isotropic_angles(s * math.nan, 6, 9, 3, 1.0))
        # the whole space does not turn; the side that has more room does
        left, right = nulls.isotropic_angles(s, 6, 9, 6, 0.1)
        assert not left.any() and (right > 1e-6).sum() == 3
        # of a zero weight nothing is defined, and of a rank-deficient one what exceeds the rank
        left, right = nulls.isotropic_angles(s * 0, 6, 9, 4, 0.1)
        assert left.tolist() == [90, 90, 0, 0] and right.tolist() == [90] * 4
        left, right = nulls.isotropic_angles(torch.tensor([2.0, 1.0, 0.0, 0.0]).double(), 4, 9, 3, 1e-4)
        assert left[0] == right[0] == 90 and left[1] < 1 and right[1] < 1
        # nearly so: still no garbage among the small angles
        left, _ = nulls.isotropic_angles(torch.tensor([2.0, 1.0, 1e-17, 1e-18]).double(), 4, 4, 3, 1e-4)
        assert left[0] > 80 and left[1] < 0.1
    with pytest.raises(ValueError, match="k must lie"):
        nulls.isotropic_angles(s, 6, 9, 7, 1.0)
    with pytest.raises(ValueError, match="singular values"):
        nulls.isotropic_angles(s, 7, 9, 3, 1.0)


# ---- several draws --------------------------------------------------------------------------------------------------


def test_band_holds_its_draws_and_true_angles_fall_on_either_side() -> None:
    m, n, k, draws = 70, 60, 6, 5
    w, u, values, vh = weight(m, n, np.random.default_rng(0))
    norm = 0.003 * float(w.norm())
    ranks = []
    for seed in range(40):
        left, right = nulls.isotropic_band(values, m, n, k, norm, draws=draws, seed=seed)
        for band in (left, right):
            assert bool((band.low <= band.median).all()) and bool((band.median <= band.high).all())
            assert float(band.high[0]) < 12
        d = torch.from_numpy(np.random.default_rng(1000 + seed).standard_normal((m, n)))
        observed = true_angles(u, vh, w + d * (norm / d.norm()), k)[0].max()
        ranks.append(int(observed < left.low[0]) - int(observed > left.high[0]))
    below, above = ranks.count(1), ranks.count(-1)
    # a third of all lies outside, 1/6 on either side: 6.7 of 40, standard deviation 2.4
    assert below <= 14 and above <= 14 and 4 <= below + above <= 24
    single = nulls.isotropic_angles(values, m, n, k, norm, seed=(3, 0))[0]
    assert not torch.equal(single, nulls.isotropic_angles(values, m, n, k, norm, seed=(4, 0))[0])
    alone = nulls.isotropic_band(values, m, n, k, norm, draws=1, seed=3)[0]
    assert torch.equal(alone.median, single) and torch.equal(alone.low, alone.high)


# ---- shift of the spectrum ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(200, 150), (150, 150), (120, 300)])
@pytest.mark.parametrize("relative", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_shift_by_simulation(m: int, n: int, relative: float, power: float) -> None:
    rng = np.random.default_rng(m + n)
    p = min(m, n)
    w = torch.from_numpy(rng.standard_normal((m, n)) / (m**0.5 + n**0.5))
    if power:
        u, _, vh = torch.linalg.svd(w, full_matrices=False)
        w = (u * (1 + torch.arange(p)) ** -power) @ vh
    values, norm = torch.linalg.svdvals(w), relative * float(w.norm())
    draws = 24
    squares = torch.zeros(p, dtype=torch.float64)
    for _ in range(draws):
        d = torch.from_numpy(rng.standard_normal((m, n)))
        squares += (torch.linalg.svdvals(w + d * (norm / d.norm())) - values) ** 2 / draws
    for k, tolerance in ((p, 0.08), (p // 5, 0.12)):
        simulated = math.sqrt(float(squares[:k].sum()))
        assert float(nulls.isotropic_shift(values, m, n, k, norm).norm()) == pytest.approx(simulated, rel=tolerance)
    if power and relative == 0.1:
        assert nulls.isotropic_shift(values, m, n, p, norm).norm() > 1.5 * norm / math.sqrt(max(m, n)), (
            "beyond first order"
        )


def test_shift_limits() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.0]).double()
    assert nulls.isotropic_shift(values, 4, 6, 4, 0.0).tolist() == [0.0] * 4
    for k in (1, 4):
        found = nulls.isotropic_shift(values, 4, 6, k, 1e-3)
        assert found.shape == (k,) and bool((found > 0).all()) and bool((found < 0.1).all())
