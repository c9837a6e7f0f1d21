"""Drives an analysis part by part: resumes what was interrupted, then writes tables and summary."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import _backend, packing
from .._backend import BackendUnavailable
from ..checkpoint.write import SafetensorsWriter
from ..ops import mask_algebra, update_scan
from ..output import OutputError
from . import store as st
from .crew import Crew
from .masks import part_writers
from .measure import Progress, measure
from .merge import Outcome, finish, samples
from .plan import Plan, Unit
from .scaleout import Claims, Group, Shard, alone
from .summary import context


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
        progress: called with bytes of weights as they are dealt with, 0 between the steps of a large one; one call at a
            time, but from any thread.
        shard: make only this share of the parts, beside other shards in the same directory. The one that finds all
            parts made, and itself alone, finishes; :func:`merge.merge` does so later.
        group: the processes that share the work; each calls this with an equal plan, inside ``with group``. Only rank 0
            returns a summary, and only its progress, which is that of all, is shown.

    Raises:
        OutputError: ``out`` holds something else, cannot be written to, or another process is at work there; another
            process of the group has failed.
        BackendUnavailable, ValueError: a forced backend, instruction set or number of threads that cannot be had.
        CheckpointError: a file cannot be read; finished parts stay.
        OSError: the results cannot be written (for instance a full disk); finished parts stay.
    """
    device = torch.device(device)
    check_backend(device)
    if shard and (group or overwrite):
        what = "torchrun: its processes share the work by themselves" if group else "--overwrite: shards share DIR"
        raise OutputError(f"--shard does not go with {what}")
    told = {**context(plan, without_shard(command or [])), "samples": samples(plan)}
    if group:
        return in_group(plan, Path(out), told, device, overwrite, progress, clock, group)
    claims = shard or alone
    with st.Store.open(out, plan.identity(), told, overwrite=overwrite, shared=shard is not None) as store:
        if store.finished:
            return as_it_is(plan, store, claims, progress)
        started = clock()
        effort = carry_out(plan, store, claims, device, progress)
        missing = store.parts.missing(len(plan.parts)) if shard else []
        summary = None
        if not missing and (shard is None or store.own()):
            summary = store.read_summary() if store.finished else finish(store)
        effort.log(store, started, clock())
        complete = plan.complete and summary is not None
        return Outcome(store.root, summary, len(missing), complete)


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
    group.watch(plan.nbytes, progress)
    if not group.first:
        return beside_rank_0(plan, out, device, clock, group)
    with st.Store.open(out, plan.identity(), told, overwrite=overwrite) as store:
        if store.finished:
            group.tell("finished")
            return as_it_is(plan, store, alone, progress)
        group.tell("open", st.digest(plan.identity()))
        started = clock()

        effort = carry_out(plan, store, group, device, group.count)
        if group.done():
            effort += carry_out(
                plan, store, lambda plan: iter(store.parts.missing(len(plan.parts))), device, group.count
            )
        summary = finish(store)
        effort.log(store, started, clock())
        group.tell("finished")
        return Outcome(store.root, summary, complete=plan.complete, silent_ranks=tuple(group.silent))


def beside_rank_0(plan: Plan, out: Path, device: torch.device, clock: Callable[[], float], group: Group) -> Outcome:
    """What the other processes of a group do: their parts, and no more."""
    nothing = Outcome(out, None, complete=plan.complete)
    theirs = group.wait_for("open")
    if theirs is None:
        return nothing
    if theirs != st.digest(plan.identity()):
        raise OutputError("this process sees other files, options or versions than rank 0 does; give all the same")
    store = st.Store(out, plan.identity())
    started = clock()
    try:
        effort = carry_out(plan, store, group, device, group.count)
        effort.log(store, started, clock())
        group.done()
        group.wait_for("finished")
    except Exception:  # whatever failed, the outcome may be there already
        if not store.finished:
            raise
        # this process was taken for dead: rank 0 has made its part, finished, and may have ended
    return nothing


def as_it_is(plan: Plan, store: st.Store, claims: Claims, progress: Progress | None) -> Outcome:
    if progress:
        progress(nbytes(plan, claims))
    return Outcome(store.root, store.read_summary(), complete=plan.complete)


def nbytes(plan: Plan, claims: Claims = alone) -> int:
    """Bytes of weights in the parts that a process makes which is alone, or one of the shards."""
    return sum(part_bytes(plan, index) for index in claims(plan))


def part_bytes(plan: Plan, index: int) -> int:
    return sum(plan.units[unit].nbytes for unit in plan.parts[index])


def without_shard(command: list[str]) -> list[str]:
    """The command of the whole analysis, whichever shard of it is at work."""
    kept: list[str] = []
    value_follows = False
    for word in command:
        name, equals, _ = word.partition("=")
        if value_follows:
            value_follows = False
        elif len(name) > 3 and "--shard".startswith(name):  # may be abbreviated
            value_follows = not equals
        else:
            kept.append(word)
    return kept


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
class Effort:
    """What one process did."""

    resumed: int = 0
    made: int = 0
    read_bytes: int = 0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.resumed + other.resumed, self.made + other.made, self.read_bytes + other.read_bytes)

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


def carry_out(plan: Plan, store: st.Store, claims: Claims, device: torch.device, progress: Progress | None) -> Effort:
    """Measure the claimed parts that are not there yet."""
    effort, one_at_a_time = Effort(), threading.Lock()
    with Crew(plan, device) as crew:

        def count(nbytes: int) -> None:
            crew.check()
            with one_at_a_time:
                if progress:
                    progress(nbytes)

        for index in claims(plan):
            size = part_bytes(plan, index)
            if store.parts.has(index):
                effort.resumed += 1
                count(size)
                continue
            crew.do(index, functools.partial(make_part, plan, store, index, device, count))
            effort.made += 1
            effort.read_bytes += size
    return effort


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
        store.parts.write(partial, index, tables)
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
