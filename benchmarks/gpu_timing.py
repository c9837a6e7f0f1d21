"""Times on a CUDA device, by device events."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

ROUNDS = 20


def milliseconds(run: Callable[[int], object], rounds: int = ROUNDS) -> float:
    """Median over rounds, by device events; `run` takes the round's number to rotate inputs."""
    for turn in range(3):
        run(turn)
    times = []
    for turn in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(turn)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def gemm_tflops(size: int = 8192) -> float:
    """What a large bf16 product reaches."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / milliseconds(lambda _: torch.mm(a, b, out=out)) / 1e9
