"""MaskedAdamW: shares of copy bandwidth for the sectors it must move, and the dense fused step it replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from offprin_kernels import BitMask, random_mask
from offprin_kernels.optim import MaskedAdamW

from ..registry import STEP_OPERATIONS, Traffic, masked_rows_traffic, masked_step_traffic
from . import ceilings, timing

TENSORS, SHAPE = 32, (4096, 4096)  # 537 M weights: 7 to 10 GB of weights, gradients and state
CHECKED = (257, 1030)  # of the tensor that is compared with the CPU first; sizes that divide nothing
EVERY = 20  # of the rows, one is in a mask of rows: 5 %


class Case(NamedTuple):
    mask: str
    dtype: torch.dtype
    rounding: str
    of_ceiling: float | None  # bars
    of_dense: float | None


# the dense peer steps fp32 weights, and casts them to the bf16 model where there is one
CASES = (
    Case("full", torch.bfloat16, "master", 0.88, 1.3),
    Case("full", torch.float32, "nearest", None, None),
    Case("5 % random", torch.bfloat16, "master", 0.8, 4.0),
    Case("5 % random", torch.float32, "nearest", 0.8, 4.0),
    Case("1 % random", torch.bfloat16, "master", 0.8, 10.0),
    Case("1 % random", torch.float32, "nearest", 0.8, 10.0),
    Case("5 % as rows", torch.bfloat16, "master", 0.8, 15.0),
    Case("5 % as rows", torch.float32, "nearest", 0.8, 15.0),
    Case("full", torch.bfloat16, "stochastic", None, None),
    Case("full", torch.bfloat16, "kahan", None, None),
)
SHARES = {"5 % random": 0.05, "1 % random": 0.01, "5 % as rows": 1 / EVERY}


def make_mask(kind: str, shape: tuple[int, ...], seed: int, device: torch.device) -> BitMask | None:
    if kind == "full":
        return None
    if kind == "5 % as rows":
        rows = torch.arange(shape[0], device=device) % EVERY == seed % EVERY
        return BitMask.from_dense(rows[:, None].expand(shape))
    return random_mask(shape, SHARES[kind], seed=seed, device=device)


def parameters(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[torch.nn.Parameter]:
    params = []
    for shape in shapes:
        param = torch.nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype))
        param.grad = (torch.randn(shape, device=device) * 1e-3).to(dtype)
        params.append(param)
    return params


def optimizer(
    kind: str, dtype: torch.dtype, rounding: str, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> MaskedAdamW:
    params = parameters(dtype, shapes, device)
    masks = {p: make_mask(kind, tuple(p.shape), i, device) for i, p in enumerate(params)}
    return MaskedAdamW(params, masks=None if kind == "full" else masks, rounding=rounding)


def check(case: Case, device: torch.device, shape: tuple[int, int] = CHECKED) -> None:
    """Three steps, against the reference on the CPU, bit for bit, and what was visibly moved. Raises RuntimeError."""
    start, results = (torch.randn(shape) * 0.02).to(case.dtype), []
    for place, backend in ((torch.device("cpu"), "reference"), (device, None)):
        param = torch.nn.Parameter(start.clone().to(place))
        mask = make_mask(case.mask, shape, 0, torch.device("cpu"))
        masks = None if mask is None else {param: mask.to(place)}
        stepped = MaskedAdamW([param], masks=masks, rounding=case.rounding, track_visible=True, backend=backend)
        for step in range(3):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 1e-3
            param.grad = grad.to(case.dtype).to(place)
            stepped.step()
        results.append((param.detach().cpu(), stepped.visible_mask(param).to("cpu")))
    if not (torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]):
        raise RuntimeError(f"masked_adamw is wrong on the device ({case}): no timing of a wrong answer")


def fused(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Callable[[int], None]:
    """One call steps the peer in fp32; where the model is bf16, casts it too."""
    params = parameters(torch.float32, shapes, device)
    peer = torch.optim.AdamW(params, fused=True)
    stored = [torch.empty_like(p, dtype=dtype) for p in params] if dtype != torch.float32 else []

    def step(_: int) -> None:
        peer.step()
        if stored:
            torch._foreach_copy_(stored, [p.detach() for p in params])

    return step


def traffic_of(case: Case, weights: int) -> Traffic:
    extra = 2 if case.rounding in ("master", "kahan") else 0
    if case.mask == "5 % as rows":
        return masked_rows_traffic(weights, SHARES[case.mask], case.dtype.itemsize, extra=extra)
    return masked_step_traffic(weights, SHARES.get(case.mask), case.dtype.itemsize, extra=extra)


def run(
    device: str = "cuda",
    tensors: int = TENSORS,
    shape: tuple[int, int] = SHAPE,
    nbytes: int = ceilings.BANDWIDTH_BYTES,
    rounds: int = timing.ROUNDS,
) -> dict:
    """The slice ``masked_adamw``."""
    place, shapes, found = torch.device(device), [shape] * tensors, []
    torch.manual_seed(0)
    weights = tensors * shape[0] * shape[1]
    for case in CASES:
        check(case, place)
        ours = optimizer(case.mask, case.dtype, case.rounding, shapes, place)
        moved, copying = ceilings.copy(place, nbytes)
        peer = fused(case.dtype, shapes, place)
        ms = timing.turns({"ours": lambda _, o=ours: o.step(), "dense": peer, "copy": copying}, place, rounds)  # type: ignore[misc]
        row = timing.row(
            "masked_adamw", f"{case.mask}, {case.rounding}", "triton" if place.type == "cuda" else "cpu",
            {"tensors": tensors, "rows": shape[0], "columns": shape[1],
             "dtype": str(case.dtype).removeprefix("torch."), "mask": case.mask},
            ms["ours"], nbytes=traffic_of(case, weights).total,
            operations=STEP_OPERATIONS * weights * SHARES.get(case.mask, 1.0),
            ceiling=ceilings.bandwidth("copy", moved, ms["copy"]), bar=case.of_ceiling,
        )  # fmt: skip
        what = "torch.optim.AdamW(fused=True) on fp32" + (" and the cast to bf16" * (case.dtype == torch.bfloat16))
        row["ratios"].append(timing.faster(what, ms["ours"], ms["dense"], case.of_dense))
        found.append(row)
        del ours, peer, copying
    return {"rows": found}
