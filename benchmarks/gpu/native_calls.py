"""``python -m benchmarks.gpu.native_calls``: the native CUDA kernels on small odd inputs, for a sanitizer to watch."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from offprin_kernels.ops.update_scan import Output, Rule, scan

# vectors of 8 and tiles end inside, at, and after a row's end
SHAPES = ((1, 1), (3, 63), (5, 64), (7, 65), (17, 130), (33, 2048), (29, 4097))
# 8 blocks of 256 threads with 8 columns each, on 148 multiprocessors, take 2.4 M columns: threads go round again
LARGE = (2600, 1024)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RULES = tuple(Rule.parse(*rule) for rule in (("bitwise",), ("ulp", 2), ("eta",), ("atol", 1e-5), ("storage",)))


def inputs(device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Aligned and, by one element, not; every pair of dtypes."""
    for shape in SHAPES:
        for base_dtype in DTYPES:
            for tuned_dtype in DTYPES:
                for shift in (0, 1):
                    numel = shape[0] * shape[1]
                    flat = torch.randn(numel + shift, device=device)
                    base = flat.to(base_dtype)[shift:].view(shape)
                    yield base, (flat * 1.003).to(tuned_dtype)[shift:].view(shape)
    base = torch.randn(LARGE, device=device)
    yield base.bfloat16(), (base * 1.003).bfloat16()


def run(device: str = "cuda", backend: str = "cuda") -> int:
    """How many calls were made; each is compared with the reference. Raises RuntimeError."""
    torch.manual_seed(0)
    calls = 0
    for base, after in inputs(torch.device(device)):
        for outputs in (Output.MASK, Output.MASK | Output.ROWS, Output(0)):
            got = scan(base, after, RULES, outputs, backend=backend)
            want = scan(base.cpu(), after.cpu(), RULES, outputs, backend="reference")
            if not all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True)):
                raise RuntimeError(f"update_scan is wrong on {tuple(base.shape)} {base.dtype} {after.dtype}")
            calls += 1
    return calls


if __name__ == "__main__":
    print(f"{run(*sys.argv[1:])} calls made")
