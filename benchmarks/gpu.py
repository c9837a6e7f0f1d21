"""GPU benchmarks: `python -m benchmarks.gpu` on a CUDA machine writes benchmarks/results/<device>.json.

Correctness first: every timed call is compared with the CPU library before a number is printed. Times are medians of
device events; inputs rotate so that no call finds its input in the L2.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from offprin_kernels._env import environment
from offprin_kernels.ops import mask_algebra
from offprin_kernels.ops.update_scan import Output, Rule, scan

from .gpu_subspace import topk_rows
from .gpu_timing import gemm_tflops, milliseconds
from .gpu_training import masked_adamw_rows
from .registry import SHAPES, pair_counts_traffic, update_scan_traffic

BITWISE = (Rule.parse("bitwise"),)


def make_pair(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    base = (torch.randn(shape, device="cuda", dtype=torch.float32) * 0.02).bfloat16()
    after = torch.empty_like(base)
    for rows in range(0, shape[0], 4096):  # fp32 temporaries of a slice only
        part = base[rows : rows + 4096].float()
        after[rows : rows + 4096] = part + torch.randn_like(part) * 3e-5
    return base, after


def ceilings() -> dict[str, float]:
    """Copy and read bandwidth in GB/s on 4 GB, and the rate of bf16 products."""
    source = torch.randint(0, 2**31 - 1, (1 << 30,), device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda _: target.copy_(source)) / 1e6
    read = source.nbytes / milliseconds(lambda _: source.view(torch.float32).amax()) / 1e6
    return {"copy_gb_per_s": copy, "read_gb_per_s": read, "bf16_gemm_tflops": gemm_tflops()}


def check(base: torch.Tensor, after: torch.Tensor, backend: str, outputs: Output) -> None:
    """The device against the CPU library, on a slice with an odd number of rows."""
    rows = min(1001, base.shape[0])
    got = scan(base[:rows], after[:rows], BITWISE, outputs, backend=backend)
    want = scan(base[:rows].cpu(), after[:rows].cpu(), BITWISE, outputs)
    for name, a, b in zip(got._fields, got, want, strict=True):
        same = torch.allclose(a.cpu(), b, rtol=1e-12) if name == "norms" else torch.equal(a.cpu(), b)
        if not same:
            sys.exit(f"{backend} is wrong in {name}: no timing of a wrong answer")


def torch_eta(base: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    a, b = base.float(), after.float()
    return ((b - a).abs() > 1e-3 * torch.maximum(a.abs(), b.abs())).sum()


def scan_of(pairs: list, outputs: Output, backend: str) -> Callable[[int], object]:
    return lambda turn: scan(*pairs[turn % len(pairs)], BITWISE, outputs, backend=backend)


def update_scan_rows(copy: float) -> list[dict]:
    shape = SHAPES["4GB"]
    pairs = [make_pair(shape) for _ in range(2)]
    found = []
    cases = (
        ("mask + count", Output.MASK, ("triton", "cuda")),
        ("mask + count + rows", Output.MASK | Output.ROWS, ("triton", "cuda")),
        ("all outputs", Output.all(), ("triton",)),
    )
    for name, outputs, backends in cases:
        traffic = update_scan_traffic(*shape, outputs)
        for backend in backends:
            check(*pairs[0], backend, outputs)
            ms = milliseconds(scan_of(pairs, outputs, backend))
            share = traffic.total / ms / 1e6 / copy
            found.append({"op": f"update_scan {name}", "backend": backend, "ms": ms, "share_of_copy": share})
    del pairs
    base, after = make_pair((8192, 16384))
    ours = milliseconds(lambda _: scan(base, after, (Rule.parse("eta"),), Output.MASK, backend="triton"))
    peer = milliseconds(lambda _: torch_eta(base, after))
    found.append({"op": "update_scan eta", "backend": "triton", "ms": ours, "times_faster_than_pytorch": peer / ours})
    return found


def mask_algebra_rows(copy: float) -> list[dict]:
    rows, columns = SHAPES["4GB"]
    masks = [torch.randint(0, 256, (rows, columns // 8), dtype=torch.uint8, device="cuda") for _ in range(5)]
    small = [mask[:101] for mask in masks]
    if not torch.equal(mask_algebra.pair_counts(small).cpu(), mask_algebra.pair_counts([m.cpu() for m in small])):
        sys.exit("pair_counts is wrong: no timing of a wrong answer")
    ms = milliseconds(lambda _: mask_algebra.pair_counts(masks))
    share = pair_counts_traffic(rows, columns, 5).total / ms / 1e6 / copy
    return [{"op": "pair_counts, 5 masks", "backend": "triton", "ms": ms, "share_of_copy": share}]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this PyTorch sees no CUDA device; GPU benchmarks run on a CUDA machine")
    torch.manual_seed(0)
    found = environment()
    roof = ceilings()
    copy = roof["copy_gb_per_s"]
    rows = [
        *update_scan_rows(copy),
        *mask_algebra_rows(copy),
        *masked_adamw_rows(copy),
        *topk_rows(roof["bf16_gemm_tflops"]),
    ]
    for row in rows:
        print("  ".join(f"{key}={value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items()))
    device = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    result = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": found["versions"],
        "cuda": torch.version.cuda,
        "ceilings": roof,
        "ops": rows,
    }
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
