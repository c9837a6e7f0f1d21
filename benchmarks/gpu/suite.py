"""The test-suite on the device, in parts: pytest in a process with a limit, every verdict kept as it falls."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import process
from .machine import ROOT
from .runner import MOST_SECONDS

# part -> folders and files of tests/. What a device has no part in (packaging builds wheels in isolation) is left out.
PARTS = {
    "device": ("gpu",),
    "scan": ("ops/test_update_scan.py", "ops/test_mask_algebra.py", "ops/test_contract.py", "ops/test_reference.py"),
    "step": ("ops/test_masked_adamw.py", "traps"),
    "select": ("ops/test_lowrank_select.py", "ops/test_select_random.py"),
    "subspace": ("ops/test_subspace.py", "ops/test_subspace_triton.py", "ops/test_projection.py"),
    "optim": ("optim", "watch"),
    "compile": ("compile",),
    "files": ("checkpoint", "nulls", "benchmarks_gpu", "test_bitmask.py", "test_geometry.py", "test_masks.py",
              "test_updates.py"),
    "models": ("training", "integrations", "intervene", "experiments"),
    "analysis": ("analysis",),
}  # fmt: skip
OPS = ("device", "scan", "step", "select", "subspace")  # of the kernels themselves
LEFT_OUT = ("packaging",)
MARGIN = 15  # seconds: the slice must outlive its tests, to say which of them ran
FAILURES = 50  # names kept; where more fail, it is one thing that is wrong
TALLY = "OFFPRIN_TALLY"


def count(lines: list[str]) -> dict[str, Any]:
    """Verdicts out of what tally.py wrote: a line as each test begins, one as it ends."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "xfailed": 0, "failures": [], "unfinished": None}
    open_: dict[str, None] = {}
    for line in lines:
        said = json.loads(line)
        if said["verdict"] == "begun":
            open_[said["test"]] = None
            continue
        open_.pop(said["test"], None)
        found[said["verdict"]] += 1
        if said["verdict"] == "failed" and len(found["failures"]) < FAILURES:
            found["failures"].append({"test": said["test"], "says": said["says"]})
    found["unfinished"] = next(iter(open_), None)
    return found


def verdict(ended: process.Ended, tests: dict[str, Any], limit: float) -> dict[str, Any]:
    status = "failed"
    if ended.code is None:
        status = "partial"
        error = f"ran past {limit:.0f} s, in {tests['unfinished']}"
    elif ended.code == 0 and tests["passed"]:
        return {"status": "ok", "tests": tests}
    elif tests["failed"]:
        error = f"{tests['failed']} tests failed"
    elif ended.code in (0, 5):  # pytest's code for nothing collected
        error = "no test ran"
    else:
        error = f"pytest ended with code {ended.code}" + (f", in {tests['unfinished']}" * bool(tests["unfinished"]))
    return {"status": status, "error": error, "tests": tests}


def run(part: str) -> dict[str, Any]:
    """The slice ``tests-<part>``. OFFPRIN_GPU_JOBS tests at a time, where pytest-xdist is installed (default: one)."""
    jobs = os.environ.get("OFFPRIN_GPU_JOBS", "")
    # tests of "device" fill the memory
    parallel = ["-n", jobs] if jobs and part != "device" else []
    paths = [str(ROOT / "tests" / name) for name in PARTS[part]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.tally", "-p", "no:cacheprovider", *parallel]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "tally"
        told.touch()
        limit = max(1.0, min(MOST_SECONDS, process.left()) - MARGIN)
        ended = process.run([*command, *paths], limit, Path(folder) / "log", {TALLY: str(told)})
        lines = [line for line in told.read_text().splitlines(keepends=True) if line.endswith("\n")]
    found = verdict(ended, count(lines), limit)
    if found["status"] != "ok":
        print(ended.tail)
    return found
