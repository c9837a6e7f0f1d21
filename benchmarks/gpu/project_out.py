"""project_out in place: the larger of its two floors, bytes at copy bandwidth and operations at the fp32 rate."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from offprin_kernels import project_out

from ..registry import project_operations, project_traffic
from . import ceilings, timing

SHAPE, K, BAR = (8192, 28672), 128, 0.8
# ‖ours - fp64‖ / ‖fp64‖: fp32 sums of tens of thousands, and one rounding to bf16 (2^-9 at most) on top
ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def factors(shape: tuple[int, int], k: int, device: torch.device) -> SimpleNamespace:
    u, v = (torch.linalg.qr(torch.randn(size, k, device=device))[0] for size in shape)
    return SimpleNamespace(U=u.contiguous(), Vh=v.T.contiguous())


def check(x: torch.Tensor, given: SimpleNamespace, side: str) -> None:
    """Against the CPU in fp64, and in place as out of place. Raises RuntimeError."""
    got = project_out(x.clone(), given, side, inplace=True)
    if not torch.equal(got, project_out(x, given, side)):
        # the two may block their products otherwise, not round otherwise
        off = float((got.double() - project_out(x, given, side).double()).norm() / x.double().norm())
        if off > ERROR[x.dtype]:
            raise RuntimeError(f"project_out ({side}) in place is off by {off:.1e} from out of place")
    exact = SimpleNamespace(U=given.U.cpu().double(), Vh=given.Vh.cpu().double())
    want = project_out(x.cpu().double(), exact, side)
    error = float((got.cpu().double() - want).norm() / want.norm())
    if not error <= ERROR[x.dtype]:
        raise RuntimeError(f"project_out ({side}, {x.dtype}) is off by {error:.1e}: no timing of a wrong answer")


def run(
    device: str = "cuda",
    shape: tuple[int, int] = SHAPE,
    k: int = K,
    nbytes: int = ceilings.BANDWIDTH_BYTES,
    size: int = ceilings.GEMM_SIZE,
    rounds: int = timing.ROUNDS,
) -> dict:
    """The slice ``project_out``."""
    place, found = torch.device(device), []
    torch.manual_seed(0)
    given = factors(shape, k, place)
    moved, copying = ceilings.copy(place, nbytes)
    work, product = ceilings.gemm("fp32", place, size)
    for dtype in (torch.float32, torch.bfloat16):
        count = timing.copies(shape[0] * shape[1] * dtype.itemsize, place)
        xs = [torch.randn(shape, device=place).to(dtype) for _ in range(count)]
        for side in ("both", "left", "right"):
            check(xs[0], given, side)
            candidates: dict[str, timing.Run] = {
                "ours": lambda turn, side=side, xs=xs: project_out(xs[turn % len(xs)], given, side, inplace=True),  # type: ignore[misc]
                "copy": copying,
                "product": product,
            }
            ms = timing.turns(candidates, place, rounds)
            traffic = project_traffic(*shape, k, side, dtype.itemsize)
            operations = project_operations(*shape, k, side)
            floors = (
                ceilings.bandwidth("copy", moved, ms["copy"]),
                ceilings.rate("fp32 product", work, ms["product"]),
            )
            limit = max(floors, key=lambda ceiling: timing.at_ceiling(ceiling, traffic.total, operations))
            found.append(
                timing.row(
                    "project_out",
                    f"{side}, in place",
                    "torch",
                    {"rows": shape[0], "columns": shape[1], "k": k, "dtype": str(dtype).removeprefix("torch.")},
                    ms["ours"],
                    nbytes=traffic.total,
                    operations=operations,
                    ceiling=limit,
                    bar=BAR,
                )
            )
        del xs
    return {"rows": found}
