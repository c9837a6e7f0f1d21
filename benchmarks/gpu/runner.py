"""Runs slices one after the other, each in a process of its own, and stores what they found as soon as they end."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from . import process
from .results import Results

MOST_SECONDS = 480  # of a slice: it fits into a job of ten minutes, with time to start and to copy files
LEAST_SECONDS = 45  # to start a slice with: PyTorch, a context and a first check take some 20
OUTCOME, TOLD = "outcome.json", "told.json"  # in the folder of a slice
ERROR = 2000  # characters of an error that are kept: a compiler's message can be megabytes


@dataclass(frozen=True)
class Slice:
    """``module`` has ``run(argument)``, or ``run()`` without one, which returns what the slice finds."""

    name: str
    module: str
    says: str
    argument: str = ""
    limit: float = MOST_SECONDS

    def __post_init__(self) -> None:
        if not 0 < self.limit <= MOST_SECONDS:
            raise ValueError(f"slice {self.name} may take 1 to {MOST_SECONDS} seconds, not {self.limit:g}")


class Skipped(Exception):
    """What a slice raises that cannot run here, and need not; says what is missing."""


def in_a_process(item: Slice, folder: Path) -> dict[str, Any]:
    """The outcome of a slice, whatever becomes of its process."""
    out = folder / OUTCOME
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.child", item.module, item.argument, str(folder), str(item.limit)]
    ended = process.run(command, item.limit, folder / "log")
    status = "failed"
    if ended.code is None:
        status, why = "partial", f"ran past its limit of {item.limit:g} s"
    elif ended.code or not out.exists():
        # below zero: the number of the signal that ended it
        why = f"its process ended with code {ended.code}"
    else:
        found = json.loads(out.read_text())
        return found if found["status"] == "ok" else {**found, "log": ended.tail}
    return {"status": status, "error": why, "log": ended.tail}


def chosen(
    items: Sequence[Slice], names: Sequence[str], done: dict[str, dict], again: bool, sources: str = ""
) -> list[Slice]:
    """What is to be run: by default what is missing or was stopped half-way; of slices asked for by name, also those
    that are not ok, or were when the sources were others.

    Raises ValueError for a name that no slice has.
    """
    known = {item.name: item for item in items}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no slice {name!r}; choose some of {', '.join(known)}")

    def needed(name: str) -> bool:
        found = done.get(name, {"status": "partial"})
        if again or found["status"] == "partial":
            return True
        return bool(names) and (found["status"] != "ok" or found["sources"] != sources)

    return [item for item in items if (not names or item.name in names) and needed(item.name)]


def stamped(outcome: dict[str, Any], sources: str, begun: float) -> dict[str, Any]:
    """With when and of what sources it was found, and how long that took since ``begun`` (of time.time)."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    error = (outcome.get("error") or "")[:ERROR] or None
    stamp = {"seconds": round(time.time() - begun, 1), "at": at, "sources": sources}
    return {"status": outcome["status"], **stamp, **outcome, "error": error}


class Told(TypedDict):
    """What the process of a slice is told, to keep its rows as they come."""

    name: str
    sources: str
    begun: float
    identity: dict[str, Any]
    properties: dict[str, Any]
    folder: str


def run_slice(
    item: Slice, limit: float, results: Results, sources: str, execute: Callable[[Slice, Path], dict[str, Any]]
) -> None:
    """Run one for at most ``limit`` seconds and store what it found."""
    begun = time.time()
    with tempfile.TemporaryDirectory(prefix="offprin-gpu-") as folder:
        told = {"name": item.name, "sources": sources, "begun": begun, **results.tell()}
        (Path(folder) / TOLD).write_text(json.dumps(told))
        outcome = execute(replace(item, limit=limit), Path(folder))
    # one that had all its time has failed: it would not end next time either
    if outcome["status"] == "partial" and limit == item.limit:
        outcome["status"] = "failed"
    # what its process has kept, where that had no chance to say more
    kept = results.slices().get(item.name, {})
    if (
        kept.get("status") == "partial"
        and kept.get("sources") == sources
        and outcome["status"] in ("partial", "failed")
    ):
        outcome["rows"] = max(kept.get("rows", []), outcome.get("rows", []), key=len)
    results.add(item.name, stamped(outcome, sources, begun))


def run_slices(
    items: Sequence[Slice],
    results: Results,
    names: Sequence[str] = (),
    *,
    again: bool = False,
    within: float | None = None,
    sources: str = "",
    execute: Callable[[Slice, Path], dict[str, Any]] = in_a_process,
    say: Callable[[str], None] = print,
) -> int:
    """Run what is missing, in order; 0 where every wanted slice stands as ok or skipped in the file then, else 1.

    ``within``: seconds for all. A slice may use what is left of them, and if that is less than its limit and does not
    do, it is partial: it keeps what it has found, and the next run starts it again.
    """
    ends = float("inf") if within is None else time.monotonic() + within
    for item in chosen(items, names, results.slices(), again, sources):
        limit = min(item.limit, int(min(ends - time.monotonic(), MOST_SECONDS)))
        if limit < min(item.limit, LEAST_SECONDS):
            say(f"{item.name}: not started, {max(0, limit)} s are left")
            break
        say(f"{item.name}: {item.says}")
        run_slice(item, limit, results, sources, execute)
        tell(item.name, results.slices()[item.name], say)
    done = results.slices()
    wanted = [item.name for item in items if not names or item.name in names]
    missing = [name for name in wanted if done.get(name, {"status": "partial"})["status"] == "partial"]
    failed = [name for name in wanted if name in done and done[name]["status"] == "failed"]
    say(f"{results.path}: {len(wanted) - len(missing) - len(failed)} of {len(wanted)} slices done")
    for what, which in (("failed", failed), ("missing or partial", missing)):
        if which:
            say(f"{what}: {' '.join(which)}")
    return 1 if failed or missing else 0


def tell(name: str, outcome: dict[str, Any], say: Callable[[str], None]) -> None:
    """A slice's outcome in a few lines."""
    say(
        f"{name}: {outcome['status']} after {outcome['seconds']} s"
        + (f": {outcome['error']}" if outcome["error"] else "")
    )
    for line in (outcome.get("log") or "").splitlines():
        say(f"  | {line}")
    tests = outcome.get("tests")
    if tests:
        say("  " + ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped", "xfailed")))
        for failure in tests["failures"]:
            say(f"  {failure['test']}: {failure['says']}")
    for ceiling, found in outcome.get("ceilings", {}).items():
        say(f"  {ceiling}: {found['value']:.1f} {found['unit']}")
    for row in outcome.get("rows", []):
        share = "" if row["share"] is None else f", {row['share']:.3f} of {row['ceiling']['name']}"
        say(f"  {row['op']}, {row['case']} [{row['backend']}]: {row['ms']['median']:.3f} ms{share}")
        for ratio in row["ratios"]:
            sign = "at most" if ratio["at_most"] else "at least"
            verdict = (
                "" if ratio["met"] is None else f" ({'met' if ratio['met'] else 'MISSED'}: {sign} {ratio['bar']:g})"
            )
            say(f"    {ratio['value']:.3f} {ratio['what']}{verdict}")
