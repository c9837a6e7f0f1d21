"""LoRA and PiSSA: what they start from, and what becomes of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from offprin_kernels.training import adapters
from offprin_kernels.training.model import linear_weights

from . import tiny

pytest.importorskip("peft", reason="adapters are peft's")

RANK, ALPHA = 4, 6.0
TOKENS = torch.randint(2, 19, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def says(net) -> torch.Tensor:
    return net(input_ids=TOKENS).logits


def close(net, found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 * tiny.rounding(net, wanted))


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_the_function_is_unchanged_at_the_start(kind) -> None:
    net = tiny.lively()
    before, names = says(net), set(linear_weights(net))
    adapted = adapters.attach(copy.deepcopy(net), kind, RANK, ALPHA, seed=0).eval()
    close(net, says(adapted), before)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(names) and all(".lora_A." in n or ".lora_B." in n for n in trained)


def test_lora_starts_with_no_product() -> None:
    adapted = adapters.attach(tiny.lively(), "lora", RANK, ALPHA, seed=0)
    for layer in adapters.layers(adapted):
        assert not bool(layer.lora_B["default"].weight.any()) and bool(layer.lora_A["default"].weight.all())
        assert layer.scaling["default"] == ALPHA / RANK


def test_pissa_starts_with_the_principal_part() -> None:
    net = tiny.lively()
    weights = [weight.detach().double().numpy() for weight in linear_weights(net).values()]
    adapted = adapters.attach(net, "pissa", RANK, ALPHA, seed=0)
    found = adapters.layers(adapted)
    assert len(found) == len(weights)
    for weight, layer in zip(weights, found, strict=True):
        a, b = (getattr(layer, f"lora_{side}")["default"].weight.detach().double().numpy() for side in "AB")
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        top = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
        # a subspace turned by an angle moves its part of the weight by the angle's sine, times the norm, on each side
        assert np.abs(ALPHA / RANK * (b @ a) - top).max() <= 2 * np.sin(np.radians(0.05)) * s[0]
        # each factor takes the square root of the singular values
        for norms in (np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)):
            np.testing.assert_allclose(norms**2 * ALPHA / RANK, s[:RANK], rtol=1e-3)
        rest = layer.base_layer.weight.detach().double().numpy()
        np.testing.assert_allclose(rest + ALPHA / RANK * (b @ a), weight, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_merged_is_the_adapted_function(kind) -> None:
    net = tiny.lively()
    before, names = says(net), {name for name, _ in net.named_parameters()}
    adapted = adapters.attach(net, kind, RANK, ALPHA, seed=0).eval()
    with torch.no_grad():
        for param in adapted.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    wanted = says(adapted)
    assert float((wanted - before).abs().max()) > 0.1
    plain = adapters.merged(adapted)
    assert {name for name, _ in plain.named_parameters()} == names
    close(net, says(plain), wanted)
    # merging is for a copy
    assert torch.equal(says(adapted), wanted)


def test_without_adapters_merged_is_the_model_itself() -> None:
    net = tiny.lively()
    assert adapters.merged(net) is net


def test_a_rank_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 17 exceeds 16, the smallest side of a linear layer"):
        adapters.attach(tiny.lively(), "lora", 17, ALPHA, seed=0)
