"""One parameter, and what this process sees of it: sums over its own part, before anything crosses processes."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import torch

from ..ops.update_scan import Output, contract
from ..packing import matrix_shape
from ..updates import update_scan
from .basis import Factors
from .sources import Source
from .spread import Spread

# Elements looked at together where there are temporaries: on a CPU those stay in its cache, which halves the time of
# energies; elsewhere launches should not dominate.
SLABS = {"cpu": 1 << 19}
SLAB = 1 << 24
OUTPUTS = Output.TRANSITIONS | Output.NONFINITE | Output.NORMS


class Column(enum.IntEnum):
    """Of the table of sums, float64: counts are exact in it up to 2^53."""

    CHANGED = 0
    SIGN_FLIPS = 1
    TO_NONZERO = 2
    TO_ZERO = 3
    NONFINITE = 4
    BASE = 5  # ||W0||^2
    UPDATE = 6  # ||D||^2
    LEFT = 7  # ||U^T D||^2
    RIGHT = 8  # ||D V||^2
    BOTH = 9  # ||U^T D V||^2


@dataclass
class Watched:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    linear: bool
    spread: Spread | None
    source: Source
    rounded: bool = False  # stored as bf16: what a null of rounding is about
    factors: Factors | None = None
    exponents: np.ndarray | None = None  # int64 [256], over all processes; known after the first measurement


@dataclass
class Look:
    """What one process sees of a parameter."""

    row: torch.Tensor  # float64, by Column
    largest: torch.Tensor  # int64: bits of max |D| in fp32, which order as the values do, NaN above infinity
    exponents: torch.Tensor  # int64 [256]
    down: torch.Tensor | None = None  # fp32 [k, columns]: U^T D of this part
    across: torch.Tensor | None = None  # fp32 [rows, k]: D V of this part


def look(watched: Watched, now: torch.Tensor, exact: bool) -> Look:
    """One pass over this process' part, slab by slab where there are temporaries."""
    shape, device = matrix_shape(now.shape), now.device
    view, factors = now.reshape(shape), watched.factors
    found = Look(
        torch.zeros(len(Column), dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        torch.zeros(256, dtype=torch.int64, device=device),
    )
    row = found.row
    largest = torch.zeros((), dtype=torch.float32, device=device)
    if factors is not None:
        found.down = torch.zeros(factors.k, shape[1], device=device)
        found.across = torch.zeros(shape[0], factors.k, device=device)
    outputs = OUTPUTS if watched.exponents is not None else OUTPUTS | Output.EXPONENT_HISTOGRAM
    whole = factors is None and view.is_contiguous() and watched.source.lies_on(device)
    for start, stop in slabs(shape, None if whole else SLABS.get(device.type, SLAB)):
        tuned, base = view[start:stop], watched.source.rows(start, stop).to(device)
        raw = update_scan(base, tuned, outputs=outputs).raw
        norms = raw.norms[int(exact and contract.has_uncast(base.dtype, tuned.dtype, False))]
        row[Column.CHANGED] += raw.rule_counts[0, 0]
        row[Column.SIGN_FLIPS : Column.TO_ZERO + 1] += raw.counters[contract.SIGN_FLIPS : contract.NONZERO_TO_ZERO + 1]
        row[Column.NONFINITE] += raw.counters[contract.NAN_TUNED : contract.INF_TUNED + 1].sum()
        row[Column.BASE : Column.UPDATE + 1] += norms[contract.BASE_SQUARED : contract.UPDATE_SQUARED + 1]
        largest = torch.maximum(largest, norms[contract.UPDATE_MAX].float())
        if watched.exponents is None:
            found.exponents += raw.exponent_histogram[0]
        if factors is not None and found.down is not None and found.across is not None:
            update = difference(base, tuned, exact)
            found.down.addmm_(factors.u[start:stop].mT, update)
            found.across[start:stop] = update @ factors.vh.mT
    found.largest = largest.abs().view(torch.int32).to(torch.int64)
    return found


def slabs(shape: tuple[int, int], most: int | None) -> list[tuple[int, int]]:
    """Row ranges of at most that many elements (but a row at least), or all rows."""
    rows, columns = shape
    if not rows or not columns:
        return []
    step = rows if most is None else max(1, most // columns)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def difference(base: torch.Tensor, tuned: torch.Tensor, exact: bool) -> torch.Tensor:
    """The update in fp32, of bf16 values unless un-rounded ones are meant."""
    if not exact:
        base, tuned = base.bfloat16(), tuned.bfloat16()
    # a copy, for the subtraction in place must not reach the model
    return tuned.to(torch.float32, copy=True).sub_(base)
