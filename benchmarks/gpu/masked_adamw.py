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
# bytes that memory may move at once: a sector, on which the bars are, and two, as fetched where a device pairs them
LINES = (32, 64)
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


def backend_of(device: torch.device) -> str:
    """Named in every call, so that what a row says is what ran."""
    return "triton" if device.type == "cuda" else "cpu"


def optimizer(
    kind: str, dtype: torch.dtype, rounding: str, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> MaskedAdamW:
    params = parameters(dtype, shapes, device)
    masks = {p: make_mask(kind, tuple(p.shape), i, device) for i, p in enumerate(params)}
    return MaskedAdamW(params, masks=None if kind == "full" else masks, rounding=rounding, backend=backend_of(device))


def check(case: Case, device: torch.device, shape: tuple[int, int] = CHECKED) -> None:
    """Three steps, against the reference on the CPU: weights, state and what was visibly moved, bit for bit. Raises
    RuntimeError."""
    start, results = (torch.randn(shape) * 0.02).to(case.dtype), []
    for place, backend in ((torch.device("cpu"), "reference"), (device, backend_of(device))):
        param = torch.nn.Parameter(start.clone().to(place))
        mask = make_mask(case.mask, shape, 0, torch.device("cpu"))
        masks = None if mask is None else {param: mask.to(place)}
        stepped = MaskedAdamW([param], masks=masks, rounding=case.rounding, track_visible=True, backend=backend)
        for step in range(3):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 1e-3
            param.grad = grad.to(case.dtype).to(place)
            stepped.step()
        tensors = {"weights": param.detach().cpu(), **{key: v.cpu() for key, v in stepped.state[param].items()}}
        results.append((tensors, stepped.visible_mask(param).to("cpu")))
    (want, want_visible), (got, got_visible) = results
    wrong = [key for key in {**want, **got} if not (key in want and key in got and torch.equal(want[key], got[key]))]
    wrong += ["visible"] * (want_visible != got_visible)
    if wrong:
        said = f"masked_adamw is wrong in {', '.join(wrong)} on {backend_of(device)}"
        raise RuntimeError(f"{said} ({case}): no timing of a wrong answer")


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


def traffic_of(case: Case, weights: int, line: int = LINES[0]) -> Traffic:
    extra = 2 if case.rounding in ("master", "kahan") else 0
    if case.mask == "5 % as rows":
        return masked_rows_traffic(weights, SHARES[case.mask], case.dtype.itemsize, extra=extra)
    return masked_step_traffic(weights, SHARES.get(case.mask), case.dtype.itemsize, extra=extra, line=line)


def floors(case: Case, weights: int, ceiling: tuple[str, str, float]) -> dict[str, dict[str, float]]:
    """Of random masks: bytes and their milliseconds for either line. Rows and full steps touch whole lines alone."""
    if "random" not in case.mask:
        return {}
    bytes_ = {line: traffic_of(case, weights, line).total for line in LINES}
    return {str(line): {"bytes": n, "floor_ms": timing.at_ceiling(ceiling, n, None)} for line, n in bytes_.items()}


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
        ceiling = ceilings.bandwidth("copy", moved, ms["copy"])
        row = timing.row(
            "masked_adamw", f"{case.mask}, {case.rounding}", backend_of(place),
            {"tensors": tensors, "rows": shape[0], "columns": shape[1],
             "dtype": str(case.dtype).removeprefix("torch."), "mask": case.mask},
            ms["ours"], nbytes=traffic_of(case, weights).total,
            operations=STEP_OPERATIONS * weights * SHARES.get(case.mask, 1.0),
            ceiling=ceiling, bar=case.of_ceiling, floors_by_line=floors(case, weights, ceiling),
        )  # fmt: skip
        what = "torch.optim.AdamW(fused=True) on fp32" + (" and the cast to bf16" * (case.dtype == torch.bfloat16))
        timing.compare(row, timing.faster(what, ms["ours"], ms["dense"], case.of_dense))
        found.append(row)
        del ours, peer, copying
    return {"rows": found}
