"""Principal masks of a 4096 x 14336 weight against torch.topk over the dense reconstruction, and their memory."""

from __future__ import annotations

import math
import subprocess
import sys

import torch

from offprin_kernels.masks import count_for, principal_mask

from .timing import interleaved, median_ratio, spread

M, N, K, ALPHA = 4096, 14336, 128, 0.5


def factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, K, generator=generator))[0] for size in (M, N))
    return u, torch.arange(1, K + 1) ** -0.5, v.T.contiguous()


def dense_topk(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> torch.Tensor:
    """The largest entries of the reconstruction as one would take them."""
    flat = ((u * s) @ vh).abs_().view(-1)
    mask = torch.zeros(M * N, dtype=torch.bool)
    mask[torch.topk(flat, count_for(ALPHA, M * N), sorted=False).indices] = True
    return mask.view(M, N)


def test_principal_mask(benchmark, record) -> None:
    u, s, vh = factors()
    ours, plain = principal_mask((u, s, vh), (M, N), ALPHA).to_dense(), dense_topk(u, s, vh)
    assert int(ours.sum()) == int(plain.sum()) == count_for(ALPHA, M * N)
    # they may differ where entries lie within rounding of the threshold: sums of 128 fp32 products
    values = ((u.double() * s.double()) @ vh.double()).abs_()
    threshold, largest = float(values[ours].min()), float(values.max())
    differing = values[ours != plain]
    assert differing.numel() < 1e-5 * M * N
    assert bool(((differing - threshold).abs() < K * 2.0**-23 * largest).all())
    del values
    seconds = interleaved(
        {"ours": lambda _: principal_mask((u, s, vh), (M, N), ALPHA), "peer": lambda _: dense_topk(u, s, vh)}, rounds=5
    )
    record(
        "principal_mask, 4096 x 14336, k = 128, alpha = 0.5",
        median_ratio(seconds["peer"], seconds["ours"]),
        4,
        f"times the speed of torch.topk over the dense reconstruction ({differing.numel()} entries differ)",
        seconds=spread(seconds["ours"]),
    )
    benchmark.pedantic(principal_mask, args=((u, s, vh), (M, N), ALPHA), rounds=3)


def test_memory(benchmark, record) -> None:
    """Growth of the peak beyond the mask itself, as a share of the fp32 matrix."""
    script = (
        "import re\n"
        "from benchmarks.test_masks import ALPHA, M, N, factors, principal_mask\n"
        "def peak():\n"
        "    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "f = factors()\n"
        "principal_mask(tuple(x[:64, :64].contiguous() if x.ndim == 2 else x[:64] for x in f), (64, 64), ALPHA)\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = peak()\n"
        "mask = principal_mask(f, (M, N), ALPHA)\n"
        "print(peak() - before - mask.nbytes)\n"
    )

    def run() -> int:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return int(done.stdout)

    grown = benchmark.pedantic(run, rounds=1)
    share = max(grown, 1) / (4 * M * N)
    assert math.isfinite(share)
    record(
        "principal_mask, 4096 x 14336: peak extra memory",
        0.05 / share,
        1.0,
        "times under the budget of 5 % of the fp32 matrix",
        megabytes=grown / 1e6,
    )
