"""Slices of the runner's own tests: what can become of one. Modules as benchmarks/gpu/child.py imports them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.gpu import process, timing
from benchmarks.gpu.runner import Skipped


def run(what: str) -> dict:
    kind, _, argument = what.partition("=")
    if kind == "rows":
        return {"facts": {"said": argument}}
    if kind == "raise":
        raise RuntimeError("the answer is wrong " + "x" * 5000)
    if kind == "skip":
        raise Skipped("the tool is not installed")
    if kind == "judge":
        return {"status": "failed", "error": "two tests failed", "tests": {"passed": 1, "failed": 2, "skipped": 0,
                "xfailed": 0, "failures": [{"test": "t", "says": "no"}], "unfinished": None}}  # fmt: skip
    if kind == "crash":
        timing.row("op", "before the crash", "triton", {}, [1.0])
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "measure":
        # so many rows as asked for, and then a wait for whoever ends this
        for number in range(int(argument)):
            timing.row("op", f"case {number}", "triton", {}, [1.0])
        timing.compare(timing.MADE[-1], timing.ratio("a peer", 2.0))
        time.sleep(600)
    if kind == "hang":
        print("and then nothing", flush=True)
        # a grandchild as process.run starts one, which must not outlive its parent either
        child = subprocess.Popen(process.tied(["sleep", "600"]))
        Path(argument).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    return {}
