"""What the device reaches: bandwidth of copies, reads and writes, and rates of matrix products on random data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import timing
from .timing import Run, spread

BANDWIDTH_BYTES = 4 << 30  # of either side of a copy: what the ops are timed on
GEMM_SIZE = 8192  # 1.1 TFLOP: a millisecond and more on any device, and tiles enough for all multiprocessors
# ‖out - ref‖ / ‖ref‖ over 8192 products: bf16 operands are exact here and the output is rounded to 8 bits, tf32
# operands to 11 bits, fp32 sums in blocks; an order of magnitude above what each gives
GEMM_ERROR = {"bf16": 1e-2, "tf32": 3e-3, "fp32": 1e-4}


def random_words(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), device=device, dtype=torch.int32)


def copy(device: torch.device, nbytes: int = BANDWIDTH_BYTES) -> tuple[int, Run]:
    """Bytes read and written by a call, and the call. Checked."""
    source = random_words(nbytes, device)
    target = torch.zeros_like(source)
    target.copy_(source)
    if not torch.equal(source, target):
        raise RuntimeError("a copy on the device differs from its source")
    return 2 * source.nbytes, lambda _: target.copy_(source)


def write(device: torch.device, nbytes: int = BANDWIDTH_BYTES) -> tuple[int, Run]:
    target = random_words(nbytes, device)
    target.fill_(0x5A5A5A5A)
    if not bool((target == 0x5A5A5A5A).all()):
        raise RuntimeError("a fill on the device did not write all")
    return target.nbytes, lambda turn: target.fill_(turn)


def reads(device: torch.device, nbytes: int = BANDWIDTH_BYTES) -> tuple[int, dict[str, Run]]:
    """Bytes, and ways to read them once and write next to nothing: the fastest is the ceiling."""
    source = random_words(nbytes, device)
    ways: dict[str, Run] = {"amax": lambda _: source.amax()}
    kernel = reader(source)
    if kernel is not None:
        if int(kernel(0).sum()) & 0xFFFFFFFF != int(source.sum(dtype=torch.int64)) & 0xFFFFFFFF:
            raise RuntimeError("the kernel that measures reads did not read all")
        ways["triton"] = kernel
    return source.nbytes, ways


def reader(source: torch.Tensor) -> Callable[[int], torch.Tensor] | None:
    """Sums per program, by a Triton kernel; None where Triton does not run for this tensor."""
    from offprin_kernels import _backend

    if _backend.why_not("triton", source.device):
        return None
    from .read_kernel import sums

    return lambda _: sums(source)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gemm(kind: str, device: torch.device, size: int = GEMM_SIZE) -> tuple[float, Run]:
    """Operations of a product of random matrices in ``bf16``, ``tf32`` or ``fp32``, and the call. Checked."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.full_like(a, float("nan"))

    def run(_: int) -> None:
        with matmul_precision("high" if kind == "tf32" else "highest"):
            torch.mm(a, b, out=out)

    run(0)
    rows = slice(0, size, max(1, size // 16))  # 16 rows of it, in fp64
    exact = a[rows].double() @ b.double()
    error = float((out[rows].double() - exact).norm() / exact.norm())
    judge(kind, error if bool(out.isfinite().all()) else float("nan"), device)
    return 2.0 * size**3, run


def judge(kind: str, error: float, device: torch.device) -> None:
    """Raises RuntimeError where a product is wrong, or is none of its kind."""
    if not error <= GEMM_ERROR[kind]:
        raise RuntimeError(f"a {kind} product is off by {error:.1e}: no timing of that")
    # two operands rounded to 11 bits are off by about 3e-4; CPUs need not have such products
    if kind == "tf32" and device.type == "cuda" and error <= GEMM_ERROR["fp32"]:
        raise RuntimeError(f"a tf32 product is off by {error:.1e} alone: it was made in fp32")


def bandwidth(name: str, nbytes: int, ms: list[float]) -> tuple[str, str, float]:
    """A ceiling for :func:`timing.row`, from calls timed in turns with the op."""
    return name, "GB/s", nbytes / spread(ms)["median"] / 1e6


def rate(name: str, operations: float, ms: list[float]) -> tuple[str, str, float]:
    return name, "TFLOP/s", operations / spread(ms)["median"] / 1e9


def run(
    device: str = "cuda", nbytes: int = BANDWIDTH_BYTES, size: int = GEMM_SIZE, rounds: int = timing.ROUNDS
) -> dict:
    """The slice ``ceilings``."""
    place, found = torch.device(device), {}

    def keep(ceiling: tuple[str, str, float], ms: list[float], **details: Any) -> None:
        name, unit, value = ceiling
        found[name] = {"unit": unit, "value": value, "ms": spread(ms), **details}

    for name, make in (("copy", copy), ("write", write)):
        moved, work = make(place, nbytes)
        ms = timing.turns({name: work}, place, rounds)[name]
        keep(bandwidth(name, moved, ms), ms, bytes=moved)
        del work
    moved, ways = reads(place, nbytes)
    seen = timing.turns(ways, place, rounds)
    best = min(seen, key=lambda way: spread(seen[way])["median"])
    keep(bandwidth("read", moved, seen[best]), seen[best], bytes=moved, by=best)
    del ways
    for kind in GEMM_ERROR:
        operations, work = gemm(kind, place, size)
        ms = timing.turns({kind: work}, place, rounds)[kind]
        keep(rate(f"{kind} product", operations, ms), ms, operations=operations, size=size)
        del work
    return {"ceilings": found}
