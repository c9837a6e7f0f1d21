"""Times on a device: candidates take turns, inputs rotate past the L2, every figure keeps its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .machine import l2_bytes

ROUNDS = 21  # odd, so that the median is a round; its quartiles are the 6th and 16th
WARM_UP = 3  # compilation, the allocator's first blocks, clocks
SECONDS = 60.0  # for one table of candidates: what is slower has little spread to show

OF_CEILING = "of the ceiling"  # what begins the ratio that says so, in a row that has a bar on its share
MADE: list[dict[str, Any]] = []  # every row of this process, for a slice that ends early

Run = Callable[[int], object]


def turns(
    candidates: Mapping[str, Run],
    device: torch.device,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    seconds: float = SECONDS,
) -> dict[str, list[float]]:
    """Milliseconds of every round by candidate; each is called with the round's number, to rotate among inputs.

    The first to go changes from round to round. After ``seconds`` no further round is begun, but one always is.
    """
    names = list(candidates)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up):
        for name in names:
            candidates[name](turn)
    synchronize(device)
    begun = time.monotonic()
    for turn in range(rounds):
        if turn and time.monotonic() - begun > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(once(candidates[name], turn, device))
    return found


def once(run: Run, turn: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run(turn)
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(turn)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(ms: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles of one candidate's rounds."""
    if len(ms) < 2:
        low, middle, high = (ms[0],) * 3
    else:
        low, middle, high = statistics.quantiles(ms, n=4, method="inclusive")
    return {"median": middle, "min": min(ms), "q1": low, "q3": high, "max": max(ms), "rounds": len(ms)}


def copies(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of so many bytes to rotate: what a call left in the L2 is gone when its turn comes back.

    Two at least, whose ends would otherwise still be there; four times the L2 in all, as replacement is not exact.
    """
    return max(2, -(-4 * l2_bytes(device) // max(1, nbytes)))


# ---- rows ---------------------------------------------------------------------------------------------------------


def row(
    op: str,
    case: str,
    backend: str,
    sizes: Mapping[str, Any],
    ms: Sequence[float],
    *,
    nbytes: int | None = None,
    operations: float | None = None,
    ceiling: tuple[str, str, float] | None = None,
    floor_ms: float | None = None,
    bar: float | None = None,
    **details: Any,
) -> dict[str, Any]:
    """A measurement. ``ceiling``: name, unit and value, ``GB/s`` over the bytes or ``TFLOP/s`` over the operations.

    ``floor_ms`` need be given only where it is not the one divided by the other. ``bar``: on the share of the ceiling.
    """
    found = spread(ms)
    if ceiling is not None and floor_ms is None:
        floor_ms = at_ceiling(ceiling, nbytes, operations)
    share = None if floor_ms is None else floor_ms / found["median"]
    ratios = []
    if bar is not None and share is not None and ceiling is not None:
        ratios.append(ratio(f"{OF_CEILING}, {ceiling[0]}", share, bar))
    made = {
        "op": op,
        "case": case,
        "backend": backend,
        "sizes": dict(sizes),
        "ms": found,
        "bytes": nbytes,
        "operations": operations,
        "ceiling": None if ceiling is None else dict(zip(("name", "unit", "value"), ceiling, strict=True)),
        "floor_ms": floor_ms,
        "share": share,
        "ratios": ratios,
        "details": details,
    }
    MADE.append(made)
    return made


def at_ceiling(ceiling: tuple[str, str, float], nbytes: int | None, operations: float | None) -> float:
    """Milliseconds that the bytes or operations take at a ceiling."""
    name, unit, value = ceiling
    work = {"GB/s": nbytes, "TFLOP/s": operations}[unit]
    if work is None:
        raise ValueError(f"ceiling {name} is in {unit}, and the row does not say how much there is to do")
    # 1 GB/s is 1e6 bytes per millisecond, 1 TFLOP/s 1e9 operations
    return work / value / {"GB/s": 1e6, "TFLOP/s": 1e9}[unit]


def ratio(
    what: str, value: float, bar: float | None = None, *, at_most: bool = False, peer: Sequence[float] | None = None
) -> dict[str, Any]:
    met = None if bar is None else (value <= bar if at_most else value >= bar)
    ms = None if peer is None else spread(peer)
    return {"what": what, "value": value, "bar": bar, "at_most": at_most, "met": met, "ms": ms}


def faster(what: str, ours: Sequence[float], peer: Sequence[float], bar: float | None = None) -> dict[str, Any]:
    """How many times the speed of a peer: the median over rounds, in each of which both were timed."""
    value = statistics.median(b / a for a, b in zip(ours, peer, strict=True))
    return ratio(f"times the speed of {what}", value, bar, peer=peer)
