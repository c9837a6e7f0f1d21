"""The slices of ``python -m benchmarks.gpu``, in order: what the later ones rest on comes first."""

from __future__ import annotations

from .runner import Slice
from .suite import PARTS

HERE = __name__.rpartition(".")[0]

SLICES = (
    Slice("versions", f"{HERE}.machine", "device, versions, backends that must be there", limit=120),
    *(Slice(f"tests-{part}", f"{HERE}.suite", f"tests: {', '.join(paths)}", part) for part, paths in PARTS.items()),
    Slice("sanitizer", f"{HERE}.sanitizer", "native kernels under compute-sanitizer"),
    Slice("ceilings", f"{HERE}.ceilings", "bandwidth of copies, reads and writes; rates of matrix products", limit=240),
    Slice("update_scan", f"{HERE}.update_scan", "update_scan, 4 GB tensors"),
    Slice("mask_algebra", f"{HERE}.mask_algebra", "counts over five packed masks"),
    Slice("masked_adamw", f"{HERE}.masked_adamw", "MaskedAdamW: full, 5 %, 1 %, rows"),
    Slice("model_step", f"{HERE}.model_step", "MaskedAdamW: 400 tensors against a flat one"),
    Slice("topk_svd", f"{HERE}.topk_svd", "topk_svd 4096 x 14336, k = 128"),
    Slice("principal_mask", f"{HERE}.principal_mask", "principal_mask 8192 x 28672, k = 128"),
    Slice("project_out", f"{HERE}.project_out", "project_out in place, 8192 x 28672, k = 128"),
    Slice("analyze", f"{HERE}.analyze", "offprin analyze on cached files"),
)
