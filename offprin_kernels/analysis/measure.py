"""Streams one unit slab by slab and adds up exact counts: the base is read once, whatever the number of runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..ops import mask_algebra
from ..ops import update_scan as op
from ..ops.update_scan import Output
from .plan import Plan, Unit
from .rows import Tally, consensus_row, pair_row, stripe_rows, tensor_row
from .spectral import measure_geometry, wanted

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


def measure(
    unit: Unit, plan: Plan, *, device: torch.device, mask_sink: MaskSink | None = None, progress: Progress | None = None
) -> UnitResult:
    """Compare every run with the base on one unit. Raises CheckpointError where a file cannot be read."""
    rules = plan.options.rules
    runs = [run for run, _ in unit.partners]
    tallies = {run: Tally(unit, rules) for run in runs}
    intersections = torch.zeros((len(runs), len(runs)), dtype=torch.int64)
    votes = torch.zeros(len(runs) + 1, dtype=torch.int64)
    for start, slabs in stream(unit, plan, device):
        base = next(slabs)
        masks = []
        for run in runs:
            tuned = next(slabs)
            raw = op.scan(base, tuned, rules, Output.all())
            tallies[run].add(start, raw)
            masks.append(raw.mask)
            if mask_sink:
                mask_sink(unit, run, start, raw.mask)
            if progress:
                progress(tuned.numel() * tuned.element_size() + (base.nbytes if run == runs[0] else 0))
        if len(masks) > 1 and base.numel():
            intersections += mask_algebra.pair_counts(masks).cpu()
            votes += mask_algebra.agreement(masks, unit.columns).cpu()
    tensors = [tensor_row(unit, plan, run, tallies[run]) for run in runs]
    stripes = [stripe for run in runs for stripe in stripe_rows(unit, plan, run, tallies[run])]
    pairs = [
        pair_row(unit, plan, runs[i], runs[j], tallies, int(intersections[i, j]))
        for i, j in itertools.combinations(range(len(runs)), 2)
    ]
    consensus = [consensus_row(unit, votes, [tallies[run] for run in runs])] if len(runs) > 1 else []
    geometry = measure_geometry(unit, plan, device) if wanted(unit, plan) else []
    return UnitResult(tensors, pairs, consensus, stripes, geometry)


def stream(unit: Unit, plan: Plan, device: torch.device) -> Iterator[tuple[int, Iterator[torch.Tensor]]]:
    """(start row, base slab then one slab per run) for consecutive row ranges, read one request ahead."""
    requests = [
        (checkpoint, ref, start, min(unit.rows, start + unit.slab_rows))
        for start in range(0, unit.rows, unit.slab_rows)
        for checkpoint, ref in [
            (plan.base, unit.base),
            *((plan.tuned[run], partner.tuned) for run, partner in unit.partners),
        ]
    ]

    def fetch(request) -> torch.Tensor:
        checkpoint, ref, start, stop = request
        return ref.read(checkpoint, start, stop).to(device, non_blocking=True)

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead: list[Future] = []
        queue = iter(requests)

        def slabs() -> Iterator[torch.Tensor]:
            for _ in range(1 + len(unit.partners)):
                while len(ahead) < 2 and (request := next(queue, None)):
                    ahead.append(reader.submit(fetch, request))
                yield ahead.pop(0).result()

        for start in range(0, unit.rows, unit.slab_rows):
            yield start, slabs()
