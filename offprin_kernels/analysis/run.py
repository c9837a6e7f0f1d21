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
from .._version import __version__
from ..checkpoint.write import SafetensorsWriter
from ..ops import mask_algebra, update_scan
from ..output import OutputError, strict
from . import store as st
from .masks import part_writers
from .measure import Progress, measure
from .parts import difference
from .plan import Plan, Unit
from .scaleout import Claims, Group, Shard, alone
from .summary import context, summarize


@dataclass(frozen=True)
class Outcome:
    """What an analysis came to: the content of ``summary.json``, or None where other shards have parts to make yet."""

    root: Path
    summary: dict | None
    resumed_parts: int
    missing_parts: int = 0
    complete: bool = True  # False where tensors were left unmatched or refused, or parts are missing


def analyze(
    plan: Plan,
    out: str | Path,
    *,
    command: list[str] | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.time,
    shard: Shard | None = None,
    group: Group | None = None,
) -> Outcome:
    """Run a plan and write ``tensors.parquet``, ``pairs.parquet`` and ``summary.json`` into ``out``.

    An interrupted analysis continues where it stopped when called again with an equal plan; the tables are then
    byte for byte those of an uninterrupted one, whatever the number of processes. A finished one is returned as it is.

    Args:
        plan: from :func:`make_plan`.
        out: directory; empty, new, or of the same plan. Locked for other processes meanwhile.
        command: recorded as provenance.
        device: where scans run; weights are streamed there slab by slab.
        overwrite: start anew, whatever analysis the directory holds; what others wrote stays.
        progress: called with bytes of weights as they are dealt with.
        shard: make only this share of the parts, beside other shards in the same directory. The one that finds all
            parts made, and itself alone, finishes; :func:`merge` does so later.
        group: the processes that share the work; each calls this with an equal plan. Only rank 0 returns a summary.

    Raises:
        OutputError: ``out`` holds something else, cannot be written to, or another process is at work there.
        BackendUnavailable, ValueError: a forced backend, instruction set or number of threads that cannot be had.
        CheckpointError: a file cannot be read; finished parts stay.
        OSError: the results cannot be written (for instance a full disk); finished parts stay.
    """
    device = torch.device(device)
    check_backend(device)
    if shard and (group or overwrite):
        what = "torchrun: its processes share the work by themselves" if group else "--overwrite: shards share DIR"
        raise OutputError(f"--shard does not go with {what}")
    told = context(plan, command or [])
    if group:
        return in_group(plan, Path(out), told, device, overwrite, progress, clock, group)
    with st.Store.open(out, plan.identity(), told, overwrite=overwrite, shared=shard is not None) as store:
        if store.finished:
            return as_it_is(plan, store, progress)
        started = clock()
        work = carry_out(plan, store, shard or alone, device, progress)
        missing = store.parts.missing(len(plan.parts)) if shard else []
        summary = None
        if not missing and (shard is None or store.own()):
            summary = store.read_summary() if store.finished else finish(store)
        work.log(store, started, clock())
        complete = plan.complete and summary is not None
        return Outcome(store.root, summary, work.resumed, len(missing), complete)


def merge(out: str | Path, others: tuple[str | Path, ...] = ()) -> Outcome:
    """Finish what shards left in ``out``; parts that lie in ``others``, made of the same plan, are copied first.

    Raises OutputError: no analysis there, parts of another version or plan, parts missing, another process at work.
    """
    with st.Store.reopen(out, __version__) as store:
        if store.finished:
            summary = store.read_summary()
            return Outcome(store.root, summary, 0, complete=summary["complete"])
        told = store.read_context()
        mine = store.stored_plan()
        for other in others:
            with st.Store.reopen(other, __version__) as second:
                theirs = second.stored_plan()
                if mine != theirs:
                    raise OutputError(f"{other} holds parts of {difference(mine or {}, theirs or {})}; not merged")
                store.parts.take(second.parts, told["parts"])
        store.parts.check(told["parts"])
        summary = finish(store)
        return Outcome(store.root, summary, told["parts"], complete=summary["complete"])


def in_group(
    plan: Plan,
    out: Path,
    told: dict,
    device: torch.device,
    overwrite: bool,
    progress: Progress | None,
    clock: Callable[[], float],
    group: Group,
) -> Outcome:
    """Rank 0 opens and finishes; all work in between."""
    if not group.first:
        mine = st.digest(plan.identity())
        theirs = group.wait_for("open")
        if theirs is None:
            return Outcome(out, None, len(plan.parts), complete=plan.complete)
        if theirs != mine:
            raise OutputError("this process sees other files, options or versions than rank 0 does; give all the same")
        store = st.Store(out, plan.identity())
        started = clock()
        work = carry_out(plan, store, group, device, progress)
        work.log(store, started, clock())
        group.done()
        group.wait_for("finished")
        return Outcome(out, None, work.resumed, complete=plan.complete)
    try:
        with st.Store.open(out, plan.identity(), told, overwrite=overwrite) as store:
            if store.finished:
                group.tell("finished")
                return as_it_is(plan, store, progress)
            group.tell("open", st.digest(plan.identity()))
            started = clock()
            work = carry_out(plan, store, group, device, progress)
            group.done()
            summary = finish(store)
            work.log(store, started, clock())
            group.tell("finished")
            return Outcome(store.root, summary, work.resumed, complete=plan.complete)
    except BaseException as error:
        group.tell("failed", str(error) or type(error).__name__)
        raise


def as_it_is(plan: Plan, store: st.Store, progress: Progress | None) -> Outcome:
    if progress:
        progress(plan.nbytes)
    return Outcome(store.root, store.read_summary(), len(plan.parts), complete=plan.complete)


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


@dataclass
class Work:
    """What one process did."""

    resumed: int = 0
    made: int = 0
    read_bytes: int = 0

    def log(self, store: st.Store, started: float, now: float) -> None:
        seconds = now - started
        store.log(
            {
                "finished": now,
                "seconds": seconds,
                "bytes_read": self.read_bytes,
                "made_parts": self.made,
                "resumed_parts": self.resumed,
            }
        )


def carry_out(plan: Plan, store: st.Store, claims: Claims, device: torch.device, progress: Progress | None) -> Work:
    """Measure the claimed parts that are not there yet."""
    work = Work()
    for index in claims(plan):
        size = sum(plan.units[unit].nbytes for unit in plan.parts[index])
        if store.parts.has(index):
            work.resumed += 1
            if progress:
                progress(size)
            continue
        make_part(plan, store, index, device, progress)
        work.made += 1
        work.read_bytes += size
    return work


def make_part(plan: Plan, store: st.Store, index: int, device: torch.device, progress: Progress | None) -> None:
    """Measure the units of one part and store their rows, and their masks where these are wanted."""
    units = [plan.units[unit] for unit in plan.parts[index]]
    partial = store.parts.begin(index)
    writers: list[SafetensorsWriter] = []
    try:
        if plan.options.save_masks:
            writers = part_writers(plan, units, partial)
        tables: dict[str, list[dict]] = {table: [] for table in st.TABLES}
        for result in measure(units, plan, device=device, mask_sink=mask_sink(writers), progress=progress):
            for table, rows in tables.items():
                rows += getattr(result, table)
        for writer in writers:
            writer.finish()
        store.write_part(partial, index, tables)
    except BaseException:
        for writer in writers:
            writer.close()
        store.parts.abandon(partial)
        raise


def mask_sink(writers: list[SafetensorsWriter]):
    """Where the packed rows of a slab go; None where masks are not saved."""
    if not writers:
        return None

    def sink(unit: Unit, run: int, start_row: int, words: torch.Tensor) -> None:
        offset = start_row * packing.row_bytes(unit.columns)
        writers[run].write(unit.name, offset, words)

    return sink


def finish(store: st.Store) -> dict:
    """Merge the parts into tables, write the summary last (it marks the analysis as finished), drop the parts."""
    told = store.read_context()
    parts, names, options = told["parts"], told["names"], told["options"]
    store.parts.check(parts)
    tables = st.tables(len(names), options["metrics"])
    for table in tables:
        store.parts.merge(table, parts, store.root / f"{table}.parquet")
    if options["save_masks"]:
        for run, name in enumerate(names):
            store.parts.merge_masks(run, parts, store.root / st.MASKS / f"{name}.safetensors")
    found = {
        "tensors": store.columns("tensors"),
        "pairs": store.columns("pairs"),
        "consensus": store.rows("consensus") if "consensus" in tables else [],
        "geometry": store.rows("geometry") if "geometry" in tables else [],
    }
    summary = strict(summarize(told, found, versions()))
    store.write_summary(summary)
    store.drop_parts()
    return summary
