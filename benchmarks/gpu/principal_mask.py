"""principal_mask: against torch.topk over the dense reconstruction, in time and in memory."""

from __future__ import annotations

import torch

from offprin_kernels.masks import count_for, principal_mask

from . import ceilings, timing

SHAPE, K, ALPHA = (8192, 28672), 128, 0.5
CHECKED, CHECKED_K = (515, 1030), 16  # compared with the CPU first; sizes that divide nothing
OF_TOPK, OF_MEMORY = 5.0, 0.05  # bars
ROWS = 512  # of the reconstruction at a time, in fp64: 117 MB

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def factors(shape: tuple[int, int], k: int, device: torch.device) -> Factors:
    u, v = (torch.linalg.qr(torch.randn(size, k, device=device))[0] for size in shape)
    return u, torch.arange(1, k + 1, device=device) ** -0.5, v.T.contiguous()


def check(given: Factors, backend: str | None) -> None:
    """Exactly as many as asked for, and none left out that is larger than one taken, beyond the rounding of a sum of k
    fp32 products. Raises RuntimeError."""
    u, s, vh = given
    shape, k = (u.shape[0], vh.shape[1]), len(s)
    mask = principal_mask(given, shape, ALPHA, backend=backend)
    if mask.count() != count_for(ALPHA, shape[0] * shape[1]):
        raise RuntimeError(f"principal_mask took {mask.count()} coordinates")
    least, most, largest = float("inf"), 0.0, 0.0
    scaled = (u.double() * s.double()).contiguous()
    for start in range(0, shape[0], ROWS):
        rows = slice(start, min(start + ROWS, shape[0]))
        values = (scaled[rows] @ vh.double()).abs_()
        inside = mask[rows].to_dense().to(values.device)
        # the largest finite stands in where a block has none
        least = min(least, float(values.masked_fill(~inside, float("inf")).min()))
        most = max(most, float(values.masked_fill(inside, 0.0).max()))
        largest = max(largest, float(values.max()))
    if most - least > 2 * k * 2.0**-23 * largest:
        raise RuntimeError(f"principal_mask leaves out {most} and takes {least}: no timing of a wrong answer")


def against_cpu(device: torch.device, backend: str | None) -> None:
    """On a small matrix: the same but for entries within rounding of the threshold."""
    given = factors(CHECKED, CHECKED_K, torch.device("cpu"))
    want = principal_mask(given, CHECKED, ALPHA, backend="reference")
    u, s, vh = (factor.to(device) for factor in given)
    got = principal_mask((u, s, vh), CHECKED, ALPHA, backend=backend).to("cpu")
    if (got ^ want).count() > 1e-4 * CHECKED[0] * CHECKED[1]:
        raise RuntimeError(f"principal_mask differs from the CPU's in {(got ^ want).count()} coordinates")


def dense_topk(given: Factors) -> torch.Tensor:
    """As one would take them."""
    u, s, vh = given
    flat = ((u * s) @ vh).abs_().view(-1)
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[torch.topk(flat, count_for(ALPHA, flat.numel()), sorted=False).indices] = True
    return mask.view(u.shape[0], vh.shape[1])


def peak(call: timing.Run, device: torch.device) -> int:
    """Bytes that a call allocates beyond what there is."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run(device: str = "cuda", shape: tuple[int, int] = SHAPE, k: int = K, rounds: int = timing.ROUNDS) -> dict:
    """The slice ``principal_mask``."""
    place = torch.device(device)
    torch.manual_seed(0)
    backend = "triton" if place.type == "cuda" else "cpu"
    against_cpu(place, backend)
    given = factors(shape, k, place)
    check(given, backend)
    work, product = ceilings.gemm("fp32", place, min(ceilings.GEMM_SIZE, shape[0]))
    candidates: dict[str, timing.Run] = {
        "ours": lambda _: principal_mask(given, shape, ALPHA, backend=backend),
        "topk": lambda _: dense_topk(given),
        "product": product,
    }
    ms = timing.turns(candidates, place, rounds, waiting=("ours",))
    weights = shape[0] * shape[1]
    row = timing.row(
        "principal_mask", f"alpha = {ALPHA}", backend,
        {"rows": shape[0], "columns": shape[1], "k": k, "dtype": "float32"}, ms["ours"],
        nbytes=4 * k * (shape[0] + shape[1] + 1) + weights // 8,
        # the reconstruction once; selecting without keeping it takes more than one
        operations=2.0 * weights * k, ceiling=ceilings.rate("fp32 product", work, ms["product"]),
        dense_bytes=4 * weights, peak_bytes=peak(candidates["ours"], place) - weights // 8,
        peer_peak_bytes=peak(candidates["topk"], place),
    )  # fmt: skip
    timing.compare(row, timing.faster("torch.topk over the dense reconstruction", ms["ours"], ms["topk"], OF_TOPK))
    if place.type == "cuda":
        share = row["details"]["peak_bytes"] / row["details"]["dense_bytes"]
        what = "of the dense fp32 reconstruction's memory, beside the mask"
        timing.compare(row, timing.ratio(what, share, OF_MEMORY, at_most=True))
    return {"rows": [row]}
