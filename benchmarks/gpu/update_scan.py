"""update_scan: shares of copy bandwidth on tensors of 4 GB, and the eta rule as one would write it in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offprin_kernels import packing
from offprin_kernels.ops.update_scan import Output, Rule, ScanTensors, scan

from ..registry import SHAPES, update_scan_traffic
from . import ceilings, timing

BITWISE, ETA = (Rule.parse("bitwise"),), (Rule.parse("eta"),)
COUNTS = Output.MASK | Output.ROWS
ROWS = 4096  # at a time, in fp32 or on their way to the CPU
# case -> outputs, backends, bar on the share of copy bandwidth
CASES = {
    "mask + counts": (Output.MASK, ("triton", "cuda"), 0.92),
    "mask + counts + rows": (COUNTS, ("triton", "cuda"), None),
    "all outputs": (Output.all(), ("triton",), 0.75),
}
REDUCED = (8192, 16384)  # for PyTorch's expression, whose fp32 temporaries are six times its input


def make_pair(shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """As RLVR leaves weights: normal ones, about a third of them moved by a ULP or a few."""
    base, after = (torch.empty(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    for start in range(0, shape[0], ROWS):
        part = base[start : start + ROWS]
        part.copy_(torch.randn(part.shape, device=device) * 0.02)
        after[start : start + ROWS] = part.float() + torch.randn(part.shape, device=device) * 3e-5
    return base, after


def differing(got: ScanTensors, want: ScanTensors) -> list[str]:
    """Names of results that are not the same; sums in fp64 may differ by their order."""
    return [
        name
        for name, a, b in zip(got._fields, got, want, strict=True)
        if not (torch.allclose(a.cpu(), b, rtol=1e-12) if name == "norms" else torch.equal(a.cpu(), b))
    ]


def check(base: torch.Tensor, after: torch.Tensor, rules: Sequence[Rule], outputs: Output, backend: str) -> None:
    """Everything against the reference on a slice of odd size at either end, the whole mask and its count against the
    CPU library. Raises RuntimeError."""
    columns = base.shape[1] - 3
    for rows in (slice(0, 101), slice(-57, None)):
        a, b = base[rows, :columns], after[rows, :columns]
        wrong = differing(scan(a, b, rules, outputs, backend=backend),
                          scan(a.cpu(), b.cpu(), rules, outputs, backend="reference"))  # fmt: skip
        if wrong:
            raise RuntimeError(f"update_scan on {backend} is wrong in {', '.join(wrong)}: no timing of a wrong answer")
    got = scan(base, after, rules, outputs, backend=backend)
    changed = 0
    for start in range(0, base.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        want = scan(base[rows].cpu(), after[rows].cpu(), rules, Output.MASK)
        changed += int(want.rule_counts[0, 0])
        if Output.MASK in outputs and not torch.equal(got.mask[rows].cpu(), want.mask):
            raise RuntimeError(f"update_scan on {backend} has a wrong mask from row {start} on")
    if int(got.rule_counts[0, 0]) != changed:
        raise RuntimeError(f"update_scan on {backend} counts {int(got.rule_counts[0, 0])} changes of {changed}")


def torch_eta(base: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    a, b = base.float(), after.float()
    return ((b - a).abs() > 1e-3 * torch.maximum(a.abs(), b.abs())).sum()


def case_row(name: str, backend: str, outputs: Output, pairs: list, bar: float | None, rounds: int) -> dict:
    base, after = pairs[0]
    device, (rows, columns) = base.device, base.shape
    check(base, after, BITWISE, outputs, backend)
    mask = torch.empty(rows, packing.row_bytes(columns), dtype=torch.uint8, device=device)
    moved, copying = ceilings.copy(device, base.nbytes)

    def ours(turn: int) -> object:
        base, after = pairs[turn % len(pairs)]
        return scan(base, after, BITWISE, outputs, mask_out=mask, backend=backend)

    ms = timing.turns({"ours": ours, "copy": copying}, device, rounds)
    traffic = update_scan_traffic(rows, columns, outputs)
    sizes = {"rows": rows, "columns": columns, "dtype": "bfloat16"}
    return timing.row(
        "update_scan", name, backend, sizes, ms["ours"], nbytes=traffic.total,
        # a comparison of every pair
        operations=float(rows * columns), ceiling=ceilings.bandwidth("copy", moved, ms["copy"]), bar=bar,
    )  # fmt: skip


def run(
    device: str = "cuda",
    shape: tuple[int, int] = SHAPES["4GB"],
    reduced: tuple[int, int] = REDUCED,
    backends: Sequence[str] = ("triton", "cuda"),
    rounds: int = timing.ROUNDS,
) -> dict:
    """The slice ``update_scan``."""
    place = torch.device(device)
    torch.manual_seed(0)
    pairs = [make_pair(shape, place) for _ in range(timing.copies(2 * 2 * shape[0] * shape[1], place))]
    rows = [
        case_row(name, backend, outputs, pairs, bar, rounds)
        for name, (outputs, own, bar) in CASES.items()
        for backend in backends
        if backend in own or backend == "cpu"
    ]
    del pairs
    base, after = make_pair(reduced, place)
    check(base, after, ETA, Output.MASK, backends[0])
    if int(scan(base, after, ETA, Output.MASK, backend=backends[0]).rule_counts[0, 0]) != int(torch_eta(base, after)):
        raise RuntimeError("PyTorch's expression of the eta rule counts otherwise")
    ms = timing.turns(
        {
            "ours": lambda _: scan(base, after, ETA, Output.MASK, backend=backends[0]),
            "torch": lambda _: torch_eta(base, after),
        },
        place,
        rounds,
    )
    sizes = {"rows": reduced[0], "columns": reduced[1], "dtype": "bfloat16"}
    found = timing.row("update_scan", "rule eta", backends[0], sizes, ms["ours"])
    timing.compare(found, timing.faster("the PyTorch expression of the rule", ms["ours"], ms["torch"]))
    return {"rows": [*rows, found]}
