"""Masks from base weights: exact sizes, definitions, and what is refused."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offprin_kernels import masks, topk_svd


def weight(shape=(60, 90), seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def factors_of(w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :k], s[:k], vh[:k]


@pytest.mark.parametrize(
    ("alpha", "total", "count"),
    [
        (0.1, 10, 1), (0.3, 10, 3), (0.7, 10, 7), (0.1, 11, 2), (1e-9, 10, 1), (1.0, 10, 10), (1, 10, 10), (0.5, 0, 0),
        (0.5, 7, 4), (Fraction(1, 3), 9, 3), (Decimal("0.29"), 100, 29), (np.float32(0.1), 10, 1),
        (np.float64(0.1), 10, 1), (0.1, 10**18, 10**17),
    ],
)  # fmt: skip
def test_count_is_an_exact_ceiling(alpha, total, count) -> None:
    assert masks.count_for(alpha, total) == count


@pytest.mark.parametrize("alpha", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), "half"])
def test_alpha_out_of_range(alpha) -> None:
    with pytest.raises(ValueError, match="alpha must"):
        masks.count_for(alpha, 10)


def test_principal_is_the_largest_of_the_reconstruction() -> None:
    w = weight()
    u, s, vh = factors_of(w, 5)
    mask = masks.principal_mask((u, s, vh), w.shape, 0.2)
    assert mask.shape == w.shape and mask.count() == 1080
    dense = (u.double() * s.double() @ vh.double()).abs()
    assert float(dense[mask.to_dense()].min()) >= float(dense[~mask.to_dense()].max()) * (1 - 1e-4)
    named = SimpleNamespace(U=u.double(), S=s.double(), Vh=vh.double())
    assert masks.principal_mask(named, w.shape, 0.2) == mask


def test_rank_and_density_are_independent() -> None:
    w = weight()
    for k in (1, 60):
        for alpha in (0.01, 0.5, 1.0):
            mask = masks.principal_mask(factors_of(w, k), w.shape, alpha)
            assert mask.count() == masks.count_for(alpha, w.numel())


def test_low_magnitude_is_the_smallest_of_the_weight() -> None:
    w = weight().bfloat16()
    mask = masks.low_magnitude_mask(w, 0.3)
    assert mask.count() == 1620
    sizes = w.abs().float()
    assert float(sizes[mask.to_dense()].max()) <= float(sizes[~mask.to_dense()].min())


def test_safe_is_low_or_not_principal() -> None:
    w = weight()
    factors = factors_of(w, 8)
    low, principal = masks.low_magnitude_mask(w, 0.5), masks.principal_mask(factors, w.shape, 0.5)
    assert masks.safe_mask(w, factors, 0.5) == low | ~principal
    assert masks.safe_mask(w, factors, 0.5).density >= 0.5


def test_random_takes_a_share_or_a_number() -> None:
    assert masks.random_mask((30, 40), 0.25, 7).count() == 300
    assert masks.random_mask((30, 40), 1, 7).count() == 1
    assert masks.random_mask((30, 40), 1.0, 7).count() == 1200
    assert masks.random_mask((30, 40), 0, 7).count() == 0
    assert masks.random_mask((30, 40), 300, 7) == masks.random_mask((30, 40), 0.25, 7)
    larger, smaller = masks.random_mask((30, 40), 400, 7), masks.random_mask((30, 40), 300, 7)
    assert (smaller - larger).count() == 0


def test_any_shape_is_a_matrix() -> None:
    for shape in [(), (7,), (3, 4, 5), (0, 4)]:
        w = weight(shape)
        low = masks.low_magnitude_mask(w, 0.5)
        assert low.shape == w.shape and low.count() == masks.count_for(0.5, w.numel())
        assert masks.random_mask(shape, 0.5, 0).count() == low.count()
    u, s, vh = factors_of(weight((12, 5)), 2)
    assert masks.principal_mask((u, s, vh), (3, 4, 5), 0.5).count() == 30


def test_bad_input() -> None:
    u, s, vh = factors_of(weight(), 3)
    with pytest.raises(ValueError, match="needs 60 x 91"):
        masks.principal_mask((u, s, vh), (60, 91), 0.5)
    with pytest.raises(ValueError, match="values holds NaN or Inf"):
        masks.principal_mask((u, s * float("nan"), vh), (60, 90), 0.5)
    with pytest.raises(ValueError, match="weight holds NaN or Inf"):
        masks.low_magnitude_mask(torch.tensor([1.0, float("inf")]), 0.5)
    with pytest.raises(ValueError, match=r"count must lie in 0 \.\. 6"):
        masks.random_mask((2, 3), 7, 0)
    with pytest.raises(ValueError, match="alpha must"):
        masks.random_mask((2, 3), 1.5, 0)


@pytest.mark.parametrize("kind", masks.KINDS)
def test_masks_of_a_state_dict(kind) -> None:
    """Linear layers get the mask of their kind, experts one by one; nothing else gets any."""
    weights = {
        "model.embed_tokens.weight": weight((50, 20)),
        "model.layers.0.self_attn.q_proj.weight": weight((40, 20)),
        "model.layers.0.self_attn.q_proj.bias": weight((40,)),
        "model.layers.0.mlp.experts.gate_up_proj": weight((3, 20, 30)),
        "model.norm.weight": weight((20,)),
        "lm_head.weight": weight((50, 20)),
    }
    found = masks.weight_masks(weights, kind, 0.25, k=4)
    assert set(found) == {n for n in weights if "q_proj.weight" in n or "experts" in n}
    for name, mask in found.items():
        w = weights[name]
        assert mask.shape == w.shape
        for index, matrix in enumerate([w] if w.ndim == 2 else w):
            rows = matrix.shape[0]
            part = mask[index * rows : (index + 1) * rows]
            if kind == "random":
                assert part.count() == masks.count_for(0.25, matrix.numel())
                continue
            factors = topk_svd(matrix, 4)
            expected = {
                "low": lambda m=matrix: masks.low_magnitude_mask(m, 0.25),
                "safe": lambda m=matrix, f=factors: masks.safe_mask(m, f, 0.25),
                "principal": lambda m=matrix, f=factors: masks.principal_mask(f, m.shape, 0.25),
                "non-principal": lambda m=matrix, f=factors: ~masks.principal_mask(f, m.shape, 0.25),
            }[kind]()
            assert part == expected


def test_a_state_dict_that_gives_no_masks() -> None:
    linear = {"a.q_proj.weight": weight((8, 8))}
    with pytest.raises(ValueError, match="choose one of principal"):
        masks.weight_masks(linear, "best", 0.5)
    with pytest.raises(ValueError, match="none of the 1 weights"):
        masks.weight_masks({"norm.weight": weight((8,))}, "low", 0.5)
    linear["a.q_proj.weight"][0, 0] = float("nan")
    for kind in ("low", "principal"):
        with pytest.raises(ValueError, match=r"a\.q_proj\.weight: .*NaN"):
            masks.weight_masks(linear, kind, 0.5, k=2)
    # no gap at k: no such subspace, and a warning says so
    with pytest.warns(UserWarning, match="certified to more than"):
        masks.weight_masks({"a.q_proj.weight": torch.eye(16)}, "principal", 0.5, k=4)
