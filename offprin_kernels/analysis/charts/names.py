"""Names of runs and of kinds, short enough for axes, legends and sentences, and never alike where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..tables import Tables

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
MOST_LETTERS = 36  # of a label on an axis
MOST_RUN_LETTERS = 24  # of a run's name in legends and sentences
MOST_TOLD = 6  # runs of which a sentence speaks one by one
PARTS = "-_./: ~"  # between the parts of a name


def shorten(labels: Sequence[str], most: int = MOST_LETTERS) -> list[str]:
    """Labels of at most about that many letters. What all have in common goes first, then the middle of each.

    Names that would then read alike get their number in front.
    """
    if all(len(label) <= most for label in labels):
        return list(labels)
    found = [cut(label, most) for label in without_common(labels)]
    if len(set(found)) < len(set(labels)):
        found = [f"{i}: {cut(label, most - 4)}" for i, label in enumerate(without_common(labels), 1)]
    return found


def cut(label: str, most: int) -> str:
    """Its beginning and end."""
    if len(label) <= most:
        return label
    return f"{label[: most // 2]}{ELLIPSIS}{label[len(label) - (most - most // 2) + 1 :]}"


def without_common(labels: Sequence[str]) -> list[str]:
    """Labels without the whole parts that all begin or end with."""
    if len(set(labels)) < 2:
        return list(labels)
    before = whole_parts(beginning(labels))
    rest = [label[before:] for label in labels]
    after = whole_parts(beginning([label[::-1] for label in rest]))
    rest = [label[: len(label) - after] for label in rest]
    if not all(rest):
        return list(labels)
    return rest


def beginning(labels: Sequence[str]) -> str:
    """The letters that all labels begin with."""
    length = next((i for i, letters in enumerate(zip(*labels, strict=False)) if len(set(letters)) > 1), None)
    return min(labels, key=len)[:length]


def whole_parts(common: str) -> int:
    """Letters up to where the last whole part ends; 0 where that saves nothing."""
    length = max((i + 1 for i, letter in enumerate(common) if letter in PARTS), default=0)
    return length if length > 2 else 0


def run_names(tables: Tables, most: int = MOST_RUN_LETTERS) -> dict[str, str]:
    """By run, what figures and sentences call it."""
    return dict(zip(tables.runs, shorten(tables.runs, most), strict=True))


def told(said: Mapping[str, tuple[float, str]], names: Mapping[str, str], between: str = "; ") -> str:
    """``run text`` for each run; of many only the two extremes, by the number that comes with the text."""
    known = {run: item for run, item in said.items() if np.isfinite(item[0])}
    if len(said) <= MOST_TOLD or not known:
        return between.join(f"{names[run]}{text}" for run, (_, text) in list(said.items())[:MOST_TOLD])
    low, high = (pick(known, key=lambda run: known[run][0]) for pick in (min, max))
    return f"of {len(said)} runs, lowest {names[low]}{known[low][1]}{between}highest {names[high]}{known[high][1]}"
