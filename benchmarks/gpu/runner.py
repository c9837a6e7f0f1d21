"""Runs slices one after the other, each in a process of its own, and stores what they found as soon as they end."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import process
from .results import Results

MOST_SECONDS = 480  # of a slice: it fits into a job of ten minutes, with time to start and to copy files
ERROR = 2000  # characters of an error that are kept: a compiler's message can be megabytes


@dataclass(frozen=True)
class Slice:
    """``module`` has ``run(argument)``, or ``run()`` without one, which returns what the slice finds."""

    name: str
    module: str
    says: str
    argument: str = ""
    limit: int = MOST_SECONDS

    def __post_init__(self) -> None:
        if not 0 < self.limit <= MOST_SECONDS:
            raise ValueError(f"slice {self.name} may take 1 to {MOST_SECONDS} seconds, not {self.limit}")


class Skipped(Exception):
    """What a slice raises that cannot run here, and need not; says what is missing."""


def in_a_process(item: Slice, folder: Path) -> dict[str, Any]:
    """The outcome of a slice, whatever becomes of its process."""
    out = folder / "outcome.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.child", item.module, item.argument, str(out), str(item.limit)]
    ended = process.run(command, item.limit, folder / "log")
    if ended.code is None:
        why = f"ran past its limit of {item.limit} s"
    elif ended.code or not out.exists():
        # below zero: the number of the signal that ended it
        why = f"its process ended with code {ended.code}"
    else:
        found = json.loads(out.read_text())
        return found if found["status"] == "ok" else {**found, "log": ended.tail}
    return {"status": "failed", "error": why, "log": ended.tail}


def chosen(items: Sequence[Slice], names: Sequence[str], done: dict[str, dict], again: bool) -> list[Slice]:
    """What is to be run: by default what is missing; of slices asked for by name, all that are not ok.

    Raises ValueError for a name that no slice has.
    """
    known = {item.name: item for item in items}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no slice {name!r}; choose some of {', '.join(known)}")
    wanted = [item for item in items if not names or item.name in names]
    if again:
        return wanted
    return [item for item in wanted if item.name not in done or (names and done[item.name]["status"] != "ok")]


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

    ``within``: seconds; no slice is started whose limit does not fit into what is left of them.
    """
    begun = time.monotonic()
    left = chosen(items, names, results.slices(), again)
    for item in left:
        if within is not None and time.monotonic() - begun + item.limit > within:
            say(f"{item.name}: not started, its limit of {item.limit} s does not fit into the time left")
            break
        started = time.monotonic()
        say(f"{item.name}: {item.says}")
        with tempfile.TemporaryDirectory(prefix="offprin-gpu-") as folder:
            outcome = execute(item, Path(folder))
        outcome["error"] = (outcome.get("error") or "")[:ERROR] or None
        seconds = round(time.monotonic() - started, 1)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        results.add(item.name, {"status": outcome.pop("status"), "seconds": seconds, "at": at,
                                "sources": sources, **outcome})  # fmt: skip
        tell(item.name, results.slices()[item.name], say)
    done = results.slices()
    wanted = [item.name for item in items if not names or item.name in names]
    missing = [name for name in wanted if name not in done]
    failed = [name for name in wanted if name in done and done[name]["status"] == "failed"]
    say(f"{results.path}: {len(wanted) - len(missing) - len(failed)} of {len(wanted)} slices done")
    for what, which in (("failed", failed), ("missing", missing)):
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
