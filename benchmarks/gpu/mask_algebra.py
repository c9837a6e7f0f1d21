"""mask_algebra: counts over five packed masks, as shares of read bandwidth, and against unpacked masks in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from offprin_kernels.ops import mask_algebra as op

from ..registry import SHAPES, pair_counts_traffic
from . import ceilings, timing

RUNS, BAR = 5, 0.9
DENSITY_BITS = 2  # random words and-ed: a mask holds 2^-2 of the weights


def random_mask(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Packed words of a quarter of the coordinates; columns a multiple of 64."""
    words = torch.full((rows, columns // 8), 0xFF, dtype=torch.uint8, device=device)
    for _ in range(DENSITY_BITS):
        words &= torch.randint(0, 256, words.shape, dtype=torch.uint8, device=device)
    return words


def check(name: str, call: Callable[..., torch.Tensor], masks: list[torch.Tensor]) -> None:
    """Against the reference on odd slices at both ends, and against the CPU library on the whole."""
    for rows in (slice(0, 101), slice(-57, None)):
        small = [mask[rows].contiguous() for mask in masks]
        if not torch.equal(call(small).cpu(), call([mask.cpu() for mask in small], backend="reference")):
            raise RuntimeError(f"{name} is wrong: no timing of a wrong answer")
    if not torch.equal(call(masks).cpu(), call([mask.cpu() for mask in masks], backend=None)):
        raise RuntimeError(f"{name} is wrong on the whole: no timing of a wrong answer")


def unpacked_pairs(dense: list[torch.Tensor]) -> list[torch.Tensor]:
    return [(a & b).sum() for a, b in itertools.combinations_with_replacement(dense, 2)]


def run(
    device: str = "cuda",
    shape: tuple[int, int] = SHAPES["4GB"],
    backend: str = "triton",
    rounds: int = timing.ROUNDS,
) -> dict:
    """The slice ``mask_algebra``."""
    place = torch.device(device)
    torch.manual_seed(0)
    rows, columns = shape
    masks = [random_mask(rows, columns, place) for _ in range(RUNS)]
    words = rows * columns // 64
    # name -> the call on a list of masks, how many masks it reads, word operations, bar
    calls: dict[str, tuple[Callable[..., torch.Tensor], int, float, float | None]] = {
        "pair counts": (
            lambda given, backend=backend: op.pair_counts(given, backend=backend),
            RUNS, 2.0 * words * RUNS * (RUNS + 1) / 2, BAR,
        ),
        "agreement": (
            lambda given, backend=backend: op.agreement(given, columns, backend=backend),
            RUNS, float(words * RUNS), BAR,
        ),
        "row counts": (lambda given, backend=backend: op.row_counts(given[0], backend=backend), 1, float(words), None),
        "column counts": (
            lambda given, backend=backend: op.col_counts(given[0], columns, backend=backend), 1, float(words), None,
        ),
    }  # fmt: skip
    sizes = {"rows": rows, "columns": columns, "masks": RUNS}
    found = []
    for name, (call, read, operations, bar) in calls.items():
        check(name, call, masks)
        traffic = pair_counts_traffic(rows, columns, read)
        moved, ways = ceilings.reads(place, traffic.read)
        sets = [masks] if read == RUNS else [[mask] for mask in masks]
        candidates: dict[str, timing.Run] = {
            "ours": lambda turn, call=call, sets=sets: call(sets[turn % len(sets)]),  # type: ignore[misc]
            **ways,
        }
        ms = timing.turns(candidates, place, rounds)
        best = min(ways, key=lambda way: timing.spread(ms[way])["median"])
        found.append(
            timing.row(
                "mask_algebra",
                name,
                backend,
                {**sizes, "masks": read},
                ms["ours"],
                nbytes=traffic.total,
                operations=operations,
                ceiling=ceilings.bandwidth("read", moved, ms[best]),
                bar=bar,
            )
        )
    dense = [op.unpack(mask, columns, backend=backend) for mask in masks]
    want = [int(count) for count in unpacked_pairs(dense)]
    got = op.pair_counts(masks, backend=backend).tolist()
    if want != [got[i][j] for i, j in itertools.combinations_with_replacement(range(RUNS), 2)]:
        raise RuntimeError("PyTorch on unpacked masks counts otherwise")
    ms = timing.turns(
        {"ours": lambda _: op.pair_counts(masks, backend=backend), "torch": lambda _: unpacked_pairs(dense)},
        place,
        rounds,
    )
    timing.compare(found[0], timing.faster("(a & b).sum() on bool masks", ms["ours"], ms["torch"]))
    return {"rows": found}
