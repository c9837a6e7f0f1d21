"""Honest ratios on noisy machines: candidates take turns, each figure is the median of its own turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(
    candidates: dict[str, Callable[[int], object]], rounds: int = 9, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every round by candidate. Each is called with the round's number, to rotate among inputs.

    The first to go changes from round to round, so that nobody always pays for what the one before left behind
    (gigabytes freed, cold caches).
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            candidates[name](turn)
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
