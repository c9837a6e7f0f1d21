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
from .runner import MOST_SECONDS, Skipped

TOOLS = ("memcheck", "racecheck")
LIMIT = MOST_SECONDS // len(TOOLS) - 10  # each; what is left is the slice's own
FOUND = 9  # exit code where the tool found something: no code of Python's
# PyTorch's allocator hands out parts of large blocks, past whose ends a kernel could write unseen
SETTING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def find() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def verdict(tool: str, ended: process.Ended) -> str:
    """``clean``, or what is wrong."""
    if ended.code is None:
        return f"ran past {LIMIT} s"
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
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m"]
        with tempfile.TemporaryDirectory() as folder:
            ended = process.run([*command, "benchmarks.gpu.native_calls"], LIMIT, Path(folder) / "log", SETTING)
        facts[tool] = verdict(tool, ended)
        if facts[tool] != "clean":
            print(ended.tail)
    wrong = [f"{tool}: {said}" for tool, said in facts.items() if said != "clean"]
    return {"status": "failed", "error": "; ".join(wrong), "facts": facts} if wrong else {"facts": facts}
