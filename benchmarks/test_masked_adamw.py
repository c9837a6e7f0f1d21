"""MaskedAdamW against fused AdamW on 64 M weights in 200 tensors: full and sparse masks, masters, tracking, overhead.

The peer of a bf16 model with masters is what people do without them: fused AdamW on fp32 weights, then a cast of each
to the bf16 model. Every figure is a share of the peer's time in the same run.
"""

from __future__ import annotations

import pytest
import torch

from offprin_kernels import BitMask, random_mask
from offprin_kernels.optim import MaskedAdamW

from .timing import interleaved, median_ratio, spread

TENSORS, SHAPE = 200, (640, 512)
WEIGHTS = TENSORS * SHAPE[0] * SHAPE[1]


def parameters(dtype: torch.dtype, count: int = TENSORS, shape=SHAPE) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(count):
        param = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        param.grad = (torch.randn(shape, generator=generator) * 1e-3).to(dtype)
        params.append(param)
    return params


def masks(kind: str) -> list[BitMask] | None:
    if kind == "full":
        return None
    if kind == "5 % as whole rows":
        rows = torch.arange(SHAPE[0]) % 20 == 0
        return [BitMask.from_dense(rows[:, None].expand(SHAPE))] * TENSORS
    share = {"5 %": 0.05, "1 %": 0.01}[kind]
    return [random_mask(SHAPE, share, seed=seed) for seed in range(TENSORS)]


def ours(dtype: torch.dtype, kind: str, **options) -> MaskedAdamW:
    params, chosen = parameters(dtype), masks(kind)
    given = None if chosen is None else dict(zip(params, chosen, strict=True))
    return MaskedAdamW(params, masks=given, **options)


def fused(dtype: torch.dtype):
    """One call steps the peer; for bf16, an fp32 twin and the cast."""
    params = parameters(torch.float32)
    optimizer = torch.optim.AdamW(params, fused=True)
    if dtype == torch.float32:
        return lambda _: optimizer.step()
    stored = [torch.empty_like(p, dtype=dtype) for p in params]

    def step(_) -> None:
        optimizer.step()
        torch._foreach_copy_(stored, [p.detach() for p in params])

    return step


def check(dtype: torch.dtype, kind: str, **options) -> None:
    """Masked coordinates take PyTorch's steps, others keep their bits."""
    optimizer, steps = ours(dtype, kind, **options), 3
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = params[0].detach().clone()
    twin = torch.nn.Parameter(before.float().clone())
    twin.grad = params[0].grad.float()
    peer = torch.optim.AdamW([twin], fused=True)
    for _ in range(steps):
        optimizer.step()
        peer.step()
    mask = BitMask.ones(SHAPE) if kind == "full" else masks(kind)[0]
    dense = mask.to_dense()
    expected = torch.where(dense, twin.detach(), before.float())
    found = params[0].detach().float()
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    else:
        # masters follow fp32 exactly; what is stored is half a unit in the last place away at most
        assert bool(((found - expected).abs() <= expected.abs() * 2.0**-8).all()) and torch.equal(
            found[~dense], expected[~dense]
        )


@pytest.mark.parametrize(
    ("dtype", "kind", "bar"),
    [
        (torch.float32, "full", 1.0),
        (torch.bfloat16, "full", 1.0),
        (torch.float32, "5 %", 3.0),
        (torch.bfloat16, "5 %", 4.0),
        (torch.float32, "1 %", 8.0),
        (torch.float32, "5 % as whole rows", 10.0),
    ],
)
def test_step(benchmark, record, dtype, kind: str, bar: float) -> None:
    options = {"rounding": "master"} if dtype == torch.bfloat16 else {}
    check(dtype, kind, **options)
    optimizer, peer = ours(dtype, kind, **options), fused(dtype)
    seconds = interleaved({"ours": lambda _: optimizer.step(), "peer": peer}, rounds=11, warm_up=2)
    what = "fused AdamW, fp32" if dtype == torch.float32 else "fused AdamW in fp32 and the cast to bf16"
    record(
        f"MaskedAdamW, 64 M {'fp32' if dtype == torch.float32 else 'bf16 with masters'}, mask: {kind}",
        median_ratio(seconds["peer"], seconds["ours"]),
        bar,
        f"times the speed of {what}",
        seconds=spread(seconds["ours"]),
        peer_seconds=spread(seconds["peer"]),
    )
    benchmark.pedantic(optimizer.step, rounds=3)


@pytest.mark.parametrize("kind", ["full", "5 %"])
def test_tracking(benchmark, record, kind: str) -> None:
    plain = ours(torch.bfloat16, kind, rounding="master")
    tracking = ours(torch.bfloat16, kind, rounding="master", track_visible=True)
    seconds = interleaved(
        {"plain": lambda _: plain.step(), "tracking": lambda _: tracking.step()}, rounds=21, warm_up=2
    )
    assert 0 < tracking.visible_count() <= WEIGHTS
    record(
        f"MaskedAdamW, tracking visible changes, bf16 with masters, mask: {kind}",
        1.03 * median_ratio(seconds["plain"], seconds["tracking"]),
        1.0,
        "times under the budget of 3 % more than the step without",
        seconds=spread(seconds["tracking"]),
        peer_seconds=spread(seconds["plain"]),
    )
    benchmark.pedantic(tracking.step, rounds=3)


def test_overhead(benchmark, record) -> None:
    small = parameters(torch.float32, 1000, (16,)), parameters(torch.float32, 1000, (16,))
    optimizer, peer = MaskedAdamW(small[0]), torch.optim.AdamW(small[1], fused=True)
    seconds = interleaved({"ours": lambda _: optimizer.step(), "peer": lambda _: peer.step()}, rounds=31, warm_up=3)
    record(
        "MaskedAdamW, 1,000 tensors of 16 weights",
        median_ratio(seconds["peer"], seconds["ours"]),
        1.0,
        "times the speed of fused AdamW",
        seconds=spread(seconds["ours"]),
        peer_seconds=spread(seconds["peer"]),
    )
    benchmark.pedantic(optimizer.step, rounds=3)


def test_state(benchmark, record) -> None:
    """Bytes that an optimizer holds beside parameters and gradients."""
    for dtype, rounding, budget in ((torch.float32, "nearest", 0.65), (torch.bfloat16, "master", 0.75)):
        optimizer = ours(dtype, "5 %", rounding=rounding)
        optimizer.step()
        held = [t for entry in optimizer.entries.values() for t in (*entry.state.values(), entry.words, entry.prefix)]
        share = sum(t.numel() * t.element_size() for t in held) / WEIGHTS
        record(
            f"MaskedAdamW, state at a 5 % mask, rounding {rounding}: {share:.3f} bytes per parameter",
            budget / share,
            1.0,
            f"times under the budget of {budget} (dense: 8)",
        )
    benchmark.pedantic(optimizer.step, rounds=1)
