"""Every CUDA source, compiled for every architecture that is shipped: no spills, registers within budget."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
# BLOCKS_RESIDENT in update_scan.cu: 65,536 registers over two blocks of 256 threads
REGISTERS = {"update_scan.cu": 128}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_resources(source, arch, tmp_path) -> None:
    command = ["nvcc", "-O3", "-std=c++17", "--fmad=false", f"-gencode=arch=compute_{arch},code=sm_{arch}", "--cubin"]
    command += ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings", str(source), "-o"]
    done = subprocess.run([*command, str(tmp_path / "kernel.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [
        int(n) for pair in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr) for n in pair
    ]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert registers and spills, "the compiler reported nothing"
    assert not any(spills)
    assert max(registers) <= REGISTERS[source.name]


def test_every_source_has_a_budget() -> None:
    assert {path.name for path in SOURCES} == set(REGISTERS)
