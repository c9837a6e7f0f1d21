"""The slices of ``python -m benchmarks.gpu``, in order: the kernels' answers, their times, what rests on them."""

from __future__ import annotations

from . import sanitizer
from .runner import Slice
from .suite import OPS, PARTS

HERE = __name__.rpartition(".")[0]


def tests(part: str, limit: int) -> Slice:
    return Slice(f"tests-{part}", f"{HERE}.suite", f"tests: {', '.join(PARTS[part])}", part, limit)


def op(name: str, says: str, limit: int = 180) -> Slice:
    return Slice(name, f"{HERE}.{name}", says, limit=limit)


SLICES = (
    Slice("versions", f"{HERE}.machine", "device, versions, backends that must be there", limit=120),
    *(tests(part, 240) for part in OPS),
    op("ceilings", "bandwidth of copies, reads and writes; rates of matrix products"),
    op("update_scan", "update_scan, 4 GB tensors"),
    op("mask_algebra", "counts over five packed masks"),
    op("masked_adamw", "MaskedAdamW: full, 5 %, 1 %, rows"),
    op("model_step", "MaskedAdamW: 400 tensors against a flat one"),
    op("topk_svd", "topk_svd 4096 x 14336, k = 128", 300),
    op("principal_mask", "principal_mask 8192 x 28672, k = 128"),
    op("project_out", "project_out in place, 8192 x 28672, k = 128"),
    op("analyze", "offprin analyze on cached files", 300),
    op("sanitizer", "native kernels under compute-sanitizer", sanitizer.SECONDS),
    *(tests(part, 300) for part in PARTS if part not in OPS),
)
