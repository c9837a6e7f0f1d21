"""What a run says of its update, against numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from offprin_kernels.training.gates import Gates
from offprin_kernels.training.model import linear_weights

from . import tiny

K = 4


def moved(scale: float):
    """A model and the same one after an update of its linear layers, and of all else, which gates leave aside."""
    base = tiny.lively()
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in tuned.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * scale)
    return base, tuned


def arrays(model) -> list[np.ndarray]:
    return [weight.detach().double().numpy() for weight in linear_weights(model).values()]


def test_before_there_is_an_update() -> None:
    base, _ = moved(1.0)
    assert Gates(base, K).measure(base) == {"visible_fraction": 0, "update_norm": 0}


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.1])
def test_visible_fraction(scale) -> None:
    base, tuned = moved(scale)
    changed = total = 0
    for before, after in zip(linear_weights(base).values(), linear_weights(tuned).values(), strict=True):
        changed += int((before.detach().to(torch.bfloat16) != after.detach().to(torch.bfloat16)).sum())
        total += before.numel()
    assert 0 < changed < total
    assert Gates(base, K).measure(tuned)["visible_fraction"] == changed / total


def test_energy_and_norm() -> None:
    base, tuned = moved(1e-2)
    inside, chance, squares, base_squares = [], [], 0.0, 0.0
    for before, after in zip(arrays(base), arrays(tuned), strict=True):
        update = after - before
        u, _, vh = np.linalg.svd(before)
        part = u[:, :K].T @ update @ vh[:K].T
        inside.append((part**2).sum() / (update**2).sum())
        chance.append(K * K / update.size)
        squares, base_squares = squares + (update**2).sum(), base_squares + (before**2).sum()
    found = Gates(base, K).measure(tuned)
    assert found["update_norm"] == pytest.approx(np.sqrt(squares / base_squares), rel=1e-5)
    # subspaces certified to a twentieth of a degree turn a share of energy by at most 2 sin(0.05 degrees) a side
    assert found["energy"] == pytest.approx(np.mean(inside), abs=4 * np.sin(np.radians(0.05)))
    assert found["energy_isotropic"] == pytest.approx(np.mean(chance), rel=1e-12)


def test_an_update_inside_the_subspaces() -> None:
    base, _ = moved(1.0)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in linear_weights(tuned).values():
            u, s, vh = np.linalg.svd(weight.double().numpy())
            weight.add_(torch.from_numpy(0.1 * (u[:, :K] * s[:K]) @ vh[:K]).float())
    assert Gates(base, K).measure(tuned)["energy"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("k", [0, -1, 9, 100])
def test_k_out_of_range(k) -> None:
    with pytest.raises(ValueError, match=r"k must be between 1 and 8, half of the smallest layer's side; got"):
        Gates(tiny.lively(), k)
