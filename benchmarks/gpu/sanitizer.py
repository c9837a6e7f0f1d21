"""The native CUDA kernels under compute-sanitizer: out-of-bounds accesses (memcheck), races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import process
from .runner import Skipped

TOOLS = ("memcheck", "racecheck")
SECONDS = 300  # of the slice, shared by the tools
LIMIT = SECONDS // len(TOOLS) - 10  # each; what is left is the slice's own
PAST = "ran past"
CALLS = (sys.executable, "-m", "benchmarks.gpu.native_calls")
FOUND = 9  # exit code where the tool found something: no code of Python's
# PyTorch's allocator hands out parts of large blocks, past whose ends a kernel could write unseen
SETTING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def find() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def verdict(tool: str, ended: process.Ended, limit: float = LIMIT) -> str:
    """``clean``, or what is wrong."""
    if ended.code is None:
        return f"{PAST} {limit:.0f} s"
    errors = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", ended.output)
    counted = sum(int(number) for pair in errors for number in pair if number)
    if ended.code == 0 and errors and not counted and "calls made" in ended.output:
        return "clean"
    return f"{counted} found" if counted else f"{tool} ended with code {ended.code} and no verdict"


def run() -> dict[str, Any]:
    """The slice ``sanitizer``."""
    program = find()
    if program is None:
        raise Skipped("compute-sanitizer is not installed")
    facts = {}
    for left, tool in zip(range(len(TOOLS), 0, -1), TOOLS, strict=True):
        limit = max(1.0, min(LIMIT, process.left() / left - 10))
        # PyTorch asks the driver for what may not be there, and handles the answer: no error of a kernel
        command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
        with tempfile.TemporaryDirectory() as folder:
            ended = process.run([*command, *CALLS], limit, Path(folder) / "log", SETTING)
        facts[tool] = verdict(tool, ended, limit)
        if facts[tool] != "clean":
            print(ended.tail)
    wrong = [f"{tool}: {said}" for tool, said in facts.items() if said != "clean"]
    if not wrong:
        return {"facts": facts}
    # with nothing found, but out of time
    unfinished = all(said == "clean" or said.startswith(PAST) for said in facts.values())
    return {"status": "partial" if unfinished else "failed", "error": "; ".join(wrong), "facts": facts}
