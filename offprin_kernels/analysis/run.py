"""Drives an analysis part by part: resumes what was interrupted, then writes tables and summary."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import _backend, packing
from .._backend import BackendUnavailable
from .._env import versions
from ..checkpoint.write import SafetensorsWriter
from ..ops import mask_algebra, update_scan
from ..output import strict
from . import store as st
from .masks import mask_writers
from .measure import Progress, measure
from .plan import Plan, Unit
from .summary import summarize


@dataclass(frozen=True)
class Outcome:
    """A finished analysis: what is in ``summary.json``, and where."""

    root: Path
    summary: dict
    resumed_parts: int

    @property
    def complete(self) -> bool:
        """False where tensors were left unmatched or refused."""
        return self.summary["complete"]


def analyze(
    plan: Plan,
    out: str | Path,
    *,
    command: list[str] | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.time,
) -> Outcome:
    """Run a plan and write ``tensors.parquet``, ``pairs.parquet`` and ``summary.json`` into ``out``.

    An interrupted analysis continues where it stopped when called again with an equal plan; the tables are then
    byte for byte those of an uninterrupted one. A finished one is returned as it is.

    Args:
        plan: from :func:`make_plan`.
        out: directory; empty, new, or of the same plan. Locked for other processes meanwhile.
        command: recorded as provenance.
        device: where scans run; weights are streamed there slab by slab.
        overwrite: start anew, whatever analysis the directory holds; what others wrote stays.
        progress: called with bytes of weights as they are dealt with.

    Raises:
        OutputError: ``out`` holds something else, cannot be written to, or another process is at work there.
        BackendUnavailable, ValueError: a forced backend, instruction set or number of threads that cannot be had.
        CheckpointError: a file cannot be read; finished parts stay.
        OSError: the results cannot be written (for instance a full disk); finished parts stay.
    """
    device = torch.device(device)
    check_backend(device)
    with st.Store.open(out, plan.identity(), overwrite=overwrite) as store:
        if not store.finished:
            return carry_out(plan, store, command or [], device, progress, clock)
        if progress:
            progress(plan.nbytes)
        return Outcome(store.root, store.read_summary(), len(plan.parts))


def check_backend(device: torch.device) -> None:
    """Raise, before anything is written, where what is forced by environment variables cannot do an analysis."""
    if os.environ.get("OFFPRIN_BACKEND") == "cuda":
        raise BackendUnavailable(
            "backend 'cuda' makes masks and counts only, and an analysis needs more; use OFFPRIN_BACKEND=triton"
        )
    for op in (update_scan, mask_algebra):
        if _backend.choose(device, op.BACKENDS) == "cpu":
            _backend.instruction_set()
            _backend.threads()


def carry_out(
    plan: Plan,
    store: st.Store,
    command: list[str],
    device: torch.device,
    progress: Progress | None,
    clock: Callable[[], float],
) -> Outcome:
    """Measure the parts that are not there yet, then finish."""
    started = clock()
    resumed = read_bytes = 0
    writers = mask_writers(plan, store.root) if plan.options.save_masks else []
    if not all(writer.resumed for writer in writers):
        # masks of finished parts are gone (moved away, or already renamed when the run was cut short)
        store.drop_parts()
    for index, part in enumerate(plan.parts):
        size = sum(plan.units[unit].nbytes for unit in part)
        if store.has_part(index):
            resumed += 1
            if progress:
                progress(size)
            continue
        results = [
            measure(plan.units[unit], plan, device=device, mask_sink=mask_sink(writers), progress=progress)
            for unit in part
        ]
        for writer in writers:
            writer.sync()
        store.write_part(index, {table: [row for r in results for row in getattr(r, table)] for table in st.TABLES})
        read_bytes += size
    for writer in writers:
        writer.finish()
    summary = finish(plan, store, command)
    seconds = clock() - started
    store.log({"finished": clock(), "seconds": seconds, "bytes_read": read_bytes, "resumed_parts": resumed})
    return Outcome(store.root, summary, resumed)


def mask_sink(writers: list[SafetensorsWriter]):
    """Where the packed rows of a slab go; None where masks are not saved."""
    if not writers:
        return None

    def sink(unit: Unit, run: int, start_row: int, words: torch.Tensor) -> None:
        offset = start_row * packing.row_bytes(unit.columns)
        writers[run].write(unit.name, offset, words)

    return sink


def finish(plan: Plan, store: st.Store, command: list[str]) -> dict:
    """Merge the parts into tables, write the summary last (it marks the analysis as finished), drop the parts."""
    store.check_parts(len(plan.parts))
    tables = st.tables(len(plan.tuned), plan.options.metrics)
    for table in tables:
        store.merge_parts(table, len(plan.parts))
    consensus = store.rows("consensus") if "consensus" in tables else []
    provenance = {"command": command, "environment": versions()}
    geometry = store.rows("geometry") if "geometry" in tables else []
    summary = strict(summarize(plan, store.columns("tensors"), store.columns("pairs"), consensus, geometry, provenance))
    store.write_summary(summary)
    store.drop_parts()
    return summary
