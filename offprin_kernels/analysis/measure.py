"""Streams units slab by slab and adds up exact counts: every tensor is read once, whatever is asked of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..bitmask import BitMask
from ..ops import mask_algebra
from ..ops import update_scan as op
from ..ops.update_scan import Output
from .plan import Plan, Unit
from .rows import Tally, consensus_row, pair_row, stripe_rows, tensor_row
from .spectral import Factors, Geometry, factorise_together, wanted
from .stream import Request, stream

# (unit, run, start row, packed words of the slab)
MaskSink = Callable[[Unit, int, int, torch.Tensor], None]
# bytes of weights that have just been dealt with
Progress = Callable[[int], None]


@dataclass
class UnitResult:
    """One unit's rows of the tables."""

    tensors: list[dict]
    pairs: list[dict]
    consensus: list[dict]
    stripes: list[dict]
    geometry: list[dict]
    curves: list[dict]


def measure(
    units: Sequence[Unit],
    plan: Plan,
    *,
    device: torch.device,
    mask_sink: MaskSink | None = None,
    progress: Progress | None = None,
) -> Iterator[UnitResult]:
    """Compare every run with the base, unit after unit; the next slabs, of the next unit too, are read meanwhile.

    Results come in the order of the units, in whatever groups these are looked at. Raises CheckpointError where a file
    cannot be read.
    """
    order = groups(units, plan, device)
    ready: dict[int, UnitResult] = {}
    due = itertools.count()
    turn = next(due)
    asked = [request for group in order for at in group for request in requests(units[at], plan)]
    with stream(asked, device) as weights:
        for group in order:
            members = [units[at] for at in group]
            for at, result in zip(group, results(members, plan, weights, mask_sink, progress), strict=True):
                ready[at] = result
                while turn in ready:
                    yield ready.pop(turn)
                    turn = next(due)


def results(
    group: Sequence[Unit],
    plan: Plan,
    weights: Iterator[torch.Tensor],
    mask_sink: MaskSink | None,
    progress: Progress | None,
) -> Iterator[UnitResult]:
    """What is found for each unit of a group; a single one takes its weights as they come."""
    if len(group) == 1:
        yield Work(group[0], plan, weights, mask_sink, progress).result()
        return
    tensors = [[next(weights) for _ in range(1 + len(unit.partners))] for unit in group]
    factors = factorise_together(group, plan, tensors)
    for unit, found in zip(group, factors, strict=True):
        yield Work(unit, plan, iter(tensors.pop(0)), mask_sink, progress, found).result()


def requests(unit: Unit, plan: Plan) -> list[Request]:
    """What is read of a unit, in order: a slab of the base and of each run; whole weights where geometry needs them."""
    step = unit.rows if wanted(unit, plan) else unit.slab_rows
    sides = [(plan.base, unit.base), *((plan.tuned[run], partner.tuned) for run, partner in unit.partners)]
    return [
        Request(checkpoint, ref, start, min(unit.rows, start + step))
        for start in range(0, unit.rows, max(1, step))
        for checkpoint, ref in sides
    ]


# Devices that factorise many small matrices at once faster than one after the other.
BATCHING = ("cuda",)
# Matrices of a batch, and bytes of all that are held for it.
BATCH, BATCH_BYTES = 128, 1 << 29


def groups(units: Sequence[Unit], plan: Plan, device: torch.device) -> list[list[int]]:
    """Places of units that are factorised together, by their first: on a GPU those of equal shape, runs and dtypes.

    Experts are stored projection by projection, so that equal shapes do not follow each other.
    """
    found: list[list[int]] = []
    growing: dict[tuple, tuple[list[int], int]] = {}
    for at, unit in enumerate(units):
        if device.type not in BATCHING or not wanted(unit, plan):
            found.append([at])
            continue
        refs = [unit.base, *(partner.tuned for _, partner in unit.partners)]
        runs, dtypes = [run for run, _ in unit.partners], [ref.torch_dtype for ref in refs]
        alike = (unit.rows, unit.columns, *runs, *dtypes)
        size = unit.rows * sum(ref.row_bytes for ref in refs)
        group, held = growing.get(alike, ([], 0))
        if not group or len(group) == BATCH or held + size > BATCH_BYTES:
            group, held = [], 0
            found.append(group)
        group.append(at)
        growing[alike] = group, held + size
    return found


class Work:
    """One unit's scans. ``weights`` yields what :func:`requests` lists; ``factors``, where they are known already."""

    def __init__(
        self,
        unit: Unit,
        plan: Plan,
        weights: Iterator[torch.Tensor],
        mask_sink: MaskSink | None,
        progress: Progress | None,
        factors: Factors | None = None,
    ) -> None:
        self.unit, self.plan, self.weights, self.factors = unit, plan, weights, factors
        self.mask_sink, self.progress = mask_sink, progress
        self.runs = [run for run, _ in unit.partners]
        self.tallies = {run: Tally(unit, plan.options.rules, run) for run in self.runs}
        self.intersections = torch.zeros((len(self.runs), len(self.runs)), dtype=torch.int64)
        self.votes = torch.zeros(len(self.runs) + 1, dtype=torch.int64)
        self.geometry: list[dict] = []
        self.curves: list[dict] = []

    def result(self) -> UnitResult:
        unit, plan, runs, tallies = self.unit, self.plan, self.runs, self.tallies
        if wanted(unit, plan):
            self.scan_whole()
        else:
            self.scan_slabs()
        return UnitResult(
            tensors=[tensor_row(unit, plan, run, tallies[run]) for run in runs],
            pairs=[
                pair_row(unit, plan, runs[i], runs[j], tallies, int(self.intersections[i, j]))
                for i, j in itertools.combinations(range(len(runs)), 2)
            ],
            consensus=[consensus_row(unit, self.votes, [tallies[run] for run in runs])] if len(runs) > 1 else [],
            stripes=[stripe for run in runs for stripe in stripe_rows(unit, plan, run, tallies[run])],
            geometry=self.geometry,
            curves=self.curves,
        )

    def scan_slabs(self) -> None:
        """A slab of the base against that of every run, then the next."""
        for start in range(0, self.unit.rows, self.unit.slab_rows):
            base = next(self.weights)
            masks = [self.scan(run, start, base, next(self.weights), base.nbytes) for run in self.runs]
            self.agree(masks)

    def scan_whole(self) -> None:
        """The whole base against one run after the other; in slabs, so that sums have the same order."""
        base = next(self.weights)
        geometry = Geometry(self.unit, self.plan, base, self.factors, self.check)
        starts = range(0, self.unit.rows, self.unit.slab_rows)
        kept = []
        for run in self.runs:
            tuned = next(self.weights)
            masks = [
                self.scan(run, start, base[start:stop], tuned[start:stop], base[start:stop].nbytes)
                for start in starts
                for stop in [start + self.unit.slab_rows]
            ]
            whole = BitMask(torch.cat(masks), (self.unit.rows, self.unit.columns), check=False)
            row, curves = geometry.rows(run, tuned, whole, self.tallies[run])
            self.geometry.append(row)
            if curves:
                self.curves.append(curves)
            kept.append(masks)
        for alike in zip(*kept, strict=True):
            self.agree(list(alike))

    def scan(self, run: int, start: int, base: torch.Tensor, tuned: torch.Tensor, base_bytes: int) -> torch.Tensor:
        """Counts of one slab of one run; its packed mask."""
        raw = op.scan(base, tuned, self.plan.options.rules, Output.all())
        self.tallies[run].add(start, raw)
        if self.mask_sink:
            self.mask_sink(self.unit, run, start, raw.mask)
        if self.progress:
            self.progress(tuned.nbytes + (base_bytes if run == self.runs[0] else 0))
        return raw.mask

    def check(self) -> None:
        """A sign of life between two steps; raises where the work is not wanted any more."""
        if self.progress:
            self.progress(0)

    def agree(self, masks: list[torch.Tensor]) -> None:
        if len(masks) > 1 and masks[0].numel():
            self.intersections += mask_algebra.pair_counts(masks).cpu()
            self.votes += mask_algebra.agreement(masks, self.unit.columns).cpu()
