"""Memory that an analysis takes, from shapes alone; docs/scale.md says how far it was found right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .. import packing
from ..nulls import spectral as nulls
from ..ops import subspace
from ..ops.subspace import operand

if TYPE_CHECKING:
    from .plan import Options, Unit

# Memory of libraries that an analysis loads, beyond torch's own import (122 MiB measured), and what allocators hold
# back, which varies from run to run.
LIBRARIES = 180 << 20

# Matrices of which a process measures several at once, by the memory of one; and how many: together below 2 GiB.
SMALL_UNIT, MOST_WORKERS = 256 << 20, 8


def workers(options: Options, threads: int, device: torch.device | None = None) -> int:
    """How many small parts a process makes at once, where there are eigenproblems to solve.

    As many as it has cores; with more than MOST_WORKERS, each part gets two cores, or three, ...
    """
    on_cpu = device is None or device.type == "cpu"
    return threads // -(-threads // MOST_WORKERS) if options.metrics and on_cpu else 1


def is_small(unit: Unit, options: Options) -> bool:
    return unit_bytes(unit, options) <= SMALL_UNIT


def peak_bytes(units: Sequence[Unit], options: Options) -> int:
    """Memory that a process takes for units, at the peak: one large one, or as many small ones as are under way."""
    sizes = sorted((unit_bytes(unit, options) for unit in units), reverse=True)
    small = [size for size in sizes if size <= SMALL_UNIT]
    return max(sizes[0], sum(small[: workers(options, torch.get_num_threads())]))


def unit_bytes(unit: Unit, options: Options) -> int:
    """Memory for the weights of a unit and what is made of them, at the peak."""
    whole = bool(options.metrics) and unit.linear
    rows = unit.rows if whole else unit.slab_rows
    refs = (unit.base, *(partner.tuned for _, partner in unit.partners))
    # the base's rows and one run's are looked at while the next are fetched
    size = rows * (refs[0].row_bytes + 2 * max(ref.row_bytes for ref in refs[1:]))
    # masks of all runs and, of a whole weight, the three of the base
    size += (len(unit.partners) + 3 * whole) * rows * packing.row_bytes(unit.columns)
    size += len(unit.partners) * 8 * (unit.rows + unit.columns)
    if not whole or not unit.total:
        return size
    short = min(unit.rows, unit.columns)
    k = min(options.k, short)
    spectrum = "spectrum" in options.metrics
    # the update in fp32
    size += 4 * unit.total * (spectrum or "energy" in options.metrics)
    dtypes = {ref.torch_dtype for ref in refs}
    panelled = dtypes == {torch.bfloat16}
    # in fp64: a panel at a time of a bf16 weight, a copy that stays of others
    panel = 8 * min(unit.total, operand.PANEL) if panelled else 0
    stays = 0 if panelled else 8 * unit.total
    # Gram matrix, eigenvectors and the eigensolver's own; where values alone are wanted, fewer
    gram = subspace.whole_gram(unit.rows, unit.columns, k)
    vectors = 40 * short**2 if gram else 0
    values = 24 * short**2 if spectrum and options.nss == "full" else 0
    # the fp32 copy and the search space with what is made of it, some four fp64 blocks; rarely products in fp64 after a
    # Gram matrix
    copy = 0 if dtypes == {torch.float32} else 4 * unit.total
    blocks = 4 * 8 * min(short, subspace.search_rows(k)) * (unit.rows + unit.columns)
    search = copy + blocks + (0 if gram else panel)
    # or, without it, pairs of values for the null of their shift
    pairs = 48 * min(short**2, nulls.PAIRS) if spectrum else 0
    return size + max(stays + max(panel + 8 * short**2, vectors, values, search), pairs)
