"""A result file as tests make it: numbers that were never measured, and that say so."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import timing
from benchmarks.gpu.results import Identity

DEVICE = "Sample GPU"


def identity(**changes: Any) -> Identity:
    fields = {"device": DEVICE, "driver": "1.0", "versions": {"torch": "2.11.0"}, "date": "2026-01-02", **changes}
    return Identity(**fields)


def ceiling(unit: str, value: float) -> dict[str, Any]:
    return {"unit": unit, "value": value, "ms": timing.spread([1.0, 1.1, 1.2])}


def rows() -> list[dict[str, Any]]:
    copy, product = ("copy", "GB/s", 3000.0), ("bf16 product", "TFLOP/s", 800.0)
    sizes = {"rows": 4, "columns": 5, "dtype": "bfloat16"}
    return [
        timing.row("update_scan", "mask + counts", "triton", sizes, [3.0, 3.1, 3.2], nbytes=9 * 10**9,
                   operations=2e9, ceiling=copy, bar=0.92),
        timing.row("update_scan", "mask + counts", "cuda", sizes, [4.0, 4.1, 4.2], nbytes=9 * 10**9,
                   operations=2e9, ceiling=copy, bar=0.92),
        timing.row("topk_svd", "cold", "triton", sizes, [20.0, 21.0, 22.0], nbytes=10**8, operations=8e12,
                   ceiling=product, bar=0.4),
        timing.row("offprin analyze", "all metrics", "triton", sizes, [900.0], nbytes=10**9),
    ]  # fmt: skip


def file() -> dict[str, Any]:
    found = {"copy": ceiling("GB/s", 3000.0), "bf16 product": ceiling("TFLOP/s", 800.0),
             "fp32 product": ceiling("TFLOP/s", 50.0)}  # fmt: skip
    slices = {
        "ceilings": {"status": "ok", "seconds": 1.0, "ceilings": found},
        "update_scan": {"status": "ok", "seconds": 1.0, "rows": rows()},
        "project_out": {"status": "failed", "seconds": 1.0, "error": "wrong", "rows": [{"op": "must not be drawn"}]},
    }
    run = {**identity().of_run(), "sample": True, "properties": {}, "slices": slices}
    return {"format": 1, "device": DEVICE, "runs": [run]}
