"""Energy of rounded isotropic updates in fixed subspaces, against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from offprin_kernels import nulls


def subspaces(m: int, n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator))[0] for size in (m, n))
    return u, v.mT


def drawn(weight: torch.Tensor, u: torch.Tensor, vh: torch.Tensor, sigma: float, seed: int) -> dict[str, float]:
    noise = sigma * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    d = (weight.float() + noise).bfloat16().float() - weight.float()
    total = float(d.square().sum())
    shares = {"left": u.mT @ d, "right": d @ vh.mT, "both": u.mT @ d @ vh.mT}
    return {side: float(x.square().sum()) / total for side, x in shares.items()}


@pytest.mark.parametrize("sigma", [2e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("spread", [0.0, 0.6])
def test_mean_and_variance_by_simulation(sigma: float, spread: float) -> None:
    """With rows of unequal size, whose principal subspace leans on the large ones, shares differ from k / m."""
    m, n, k, draws = 160, 120, 12, 200
    generator = torch.Generator().manual_seed(1)
    scale = torch.exp(spread * torch.randn(m, 1, generator=generator))
    weight = (0.02 * scale * torch.randn(m, n, generator=generator)).bfloat16()
    u, _, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    u, vh = u[:, :k], vh[:k]
    found = nulls.rounded_energy_nulls(weight, u, vh, sigma)
    seen = [drawn(weight, u, vh, sigma, seed) for seed in range(draws)]
    for side, (mean, variance) in found.items():
        values = np.array([one[side] for one in seen])
        assert values.mean() == pytest.approx(mean, abs=4 * math.sqrt(variance / draws))
        # a variance of 200 draws is off by 10 %; small updates have heavier tails
        assert values.var() == pytest.approx(variance, rel=0.35 if sigma > 5e-5 else 0.6)
    plain = nulls.energy_null(m, n, k, "left").mean
    z = (plain - found["left"].mean) / math.sqrt(found["left"].variance)
    if spread and sigma < 5e-5:
        assert z > 5, "an isotropic update would be said to avoid the principal directions"


def test_large_updates_are_those_of_no_rounding() -> None:
    m, n, k = 90, 70, 9
    weight = (0.02 * torch.randn(m, n, generator=torch.Generator().manual_seed(0))).bfloat16()
    u, vh = subspaces(m, n, k, 2)
    found = nulls.rounded_energy_nulls(weight, u, vh, 1.0)
    for side, null in found.items():
        plain = nulls.energy_null(m, n, k, side)  # type: ignore[arg-type]
        assert null.mean == pytest.approx(plain.mean, rel=1e-4)
        assert null.variance == pytest.approx(plain.variance, rel=0.05)


def test_nothing_left_and_wrong_dtypes() -> None:
    weight = torch.ones(8, 6, dtype=torch.bfloat16)
    u, vh = subspaces(8, 6, 2, 0)
    for sigma in (0.0, 1e-12):
        assert all(math.isnan(null.mean) for null in nulls.rounded_energy_nulls(weight, u, vh, sigma).values())
    with pytest.raises(TypeError, match="bf16"):
        nulls.rounded_energy_nulls(weight.float(), u, vh, 1e-3)


def test_fourth_moment_by_simulation() -> None:
    for exponent, sigma in ((120, 1e-5), (120, 1e-4), (120, 1e-3), (118, 2e-2)):
        mantissa = torch.arange(128, dtype=torch.int16).repeat(20_000)
        weight = ((exponent << 7) + mantissa).view(torch.bfloat16)
        noise = sigma * torch.randn(weight.shape, generator=torch.Generator().manual_seed(exponent))
        d = ((weight.float() + noise).bfloat16().double() - weight.double()) ** 4
        error = float(d.std()) / math.sqrt(d.numel())
        assert float(d.mean()) == pytest.approx(nulls.rounding_kurtosis(sigma)[exponent], abs=5 * error, rel=2e-3)
