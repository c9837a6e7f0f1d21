"""Times on a device: candidates take turns, inputs rotate past the L2, every figure keeps its spread.

What is timed is the device alone. Each call is queued behind a kernel that does nothing for longer than the host takes
to enqueue the call, so that the device finds all of it there when the first event passes. Calls that wait for the
device themselves (topk_svd, principal_mask, analyze) are ``waiting``: they cannot be queued, the host's part in them
counts, as it does for who calls them, and without a delay none of it hides there, nor work on streams of their own.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from .machine import l2_bytes

ROUNDS = 21  # odd, so that the median is a round; its quartiles are the 6th and 16th
WARM_UP = 3  # compilation, the allocator's first blocks, clocks
SECONDS = 60.0  # for one table of candidates: what is slower has little spread to show
LEAST_DELAY, MOST_DELAY = 10.0, 100.0  # ms: far above a launch's microseconds; above 1000 launches' time
HEADROOM = 2.0  # times the host's last enqueue time: the next one may be slower
CALIBRATION = 20_000_000  # cycles: some 10 ms
IN_A_ROW = 20  # calls between two synchronisations, where the host's time is to count

OF_CEILING = "of the ceiling"  # what begins the ratio that says so, in a row that has a bar on its share
MADE: list[dict[str, Any]] = []  # every row of this process, for a slice that ends early
LISTENERS: list[Callable[[], None]] = []  # called whenever a row is made or added to

Run = Callable[[int], object]


class Times(list[float]):
    """Milliseconds on the device, round by round. ``host``: what the calls took to return, of those that returned
    before the device had begun them."""

    def __init__(self, ms: Iterable[float] = (), host: Iterable[float] = ()) -> None:
        super().__init__(ms)
        self.host = list(host)


def turns(
    candidates: Mapping[str, Run],
    device: torch.device,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    seconds: float = SECONDS,
    waiting: Collection[str] = (),
) -> dict[str, Times]:
    """Milliseconds of every round by candidate; each is called with the round's number, to rotate among inputs.

    The first to go changes from round to round. After ``seconds`` no further round is begun, but one always is.
    ``waiting``: names of those that wait for the device, and are timed as they come.
    """
    names = list(candidates)
    found = {name: Times() for name in names}
    delays = dict.fromkeys(names, LEAST_DELAY)
    for turn in range(warm_up):
        for name in names:
            start = time.perf_counter()
            candidates[name](turn)
            delays[name] = delay_after(1e3 * (time.perf_counter() - start))
    synchronize(device)
    begun = time.monotonic()
    for turn in range(rounds):
        if turn and time.monotonic() - begun > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            ms, host, queued = once(candidates[name], turn, device, 0.0 if name in waiting else delays[name])
            found[name].append(ms)
            if queued:
                found[name].host.append(host)
            delays[name] = delay_after(host)
    return found


def delay_after(host: float) -> float:
    """Milliseconds of delay for a call, whose last one took the host so many."""
    return min(MOST_DELAY, max(LEAST_DELAY, HEADROOM * host))


def once(run: Run, turn: int, device: torch.device, delay: float) -> tuple[float, float, bool]:
    """Milliseconds of the device and of the host, and whether all had been enqueued before the device began."""
    if device.type != "cuda":
        start = time.perf_counter()
        run(turn)
        ms = 1e3 * (time.perf_counter() - start)
        return ms, ms, True
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if delay:
        torch.cuda._sleep(round(delay * cycles_per_ms()))
    begin.record()
    start = time.perf_counter()
    run(turn)
    host = 1e3 * (time.perf_counter() - start)
    queued = bool(delay) and not begin.query()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host, queued


@functools.cache
def cycles_per_ms() -> float:
    """Of the delay kernel, on the current device."""
    torch.cuda._sleep(CALIBRATION)  # clocks rise
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(CALIBRATION)
    end.record()
    end.synchronize()
    return CALIBRATION / begin.elapsed_time(end)


def in_a_row(
    candidates: Mapping[str, Run], device: torch.device, rounds: int, calls: int = IN_A_ROW
) -> dict[str, list[float]]:
    """Wall milliseconds per call, of calls that follow each other without synchronisation: the slower of host and
    device. Candidates take turns."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds):
        for name in names if turn % 2 else names[::-1]:
            synchronize(device)
            start = time.perf_counter()
            for call in range(calls):
                candidates[name](call)
            synchronize(device)
            found[name].append(1e3 * (time.perf_counter() - start) / calls)
    return found


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
        "host_ms": statistics.median(ms.host) if isinstance(ms, Times) and ms.host else None,
        "bytes": nbytes,
        "operations": operations,
        "ceiling": None if ceiling is None else dict(zip(("name", "unit", "value"), ceiling, strict=True)),
        "floor_ms": floor_ms,
        "share": share,
        "ratios": ratios,
        "details": details,
    }
    MADE.append(made)
    announce()
    return made


def compare(row: dict[str, Any], *ratios: dict[str, Any]) -> None:
    """Adds ratios to a row that was made before."""
    row["ratios"].extend(ratios)
    announce()


def announce() -> None:
    for hear in LISTENERS:
        hear()


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
