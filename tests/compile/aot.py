"""Compiles planned Triton launches for GPUs that are not here, and reads what came out."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offprin_kernels._launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Triton links AMD code by itself since 3.5; before, it needs ROCm's linker.
HIP_LINKS = tuple(int(v) for v in triton.__version__.split(".")[:2]) >= (3, 5)

NVIDIA_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def arch(target: str) -> str:
    """The architecture that launch settings are asked for."""
    return TARGETS[target].backend


class Compiled:
    """One kernel for one target: registers, spills and the text of every stage."""

    def __init__(self, launch: Launch, target: str) -> None:
        self.target = target
        self.cuda = TARGETS[target].backend == "cuda"
        source = ASTSource(fn=launch.kernel, **launch.source())
        self.asm: Mapping[str, Any] = triton.compile(source, target=TARGETS[target], options=launch.options()).asm
        self.text = self.asm["ptx"] if self.cuda else self.asm["amdgcn"]
        self.registers, self.spilled = self.cuda_usage() if self.cuda else self.hip_usage()

    def cuda_usage(self) -> tuple[int, int]:
        """Registers of a thread, and instructions that read or write local memory, where spills go."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            command = [tool("cuobjdump"), "-res-usage", "-sass", file.name]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return number(r"REG:(\d+)", listing), len(re.findall(r"\b(?:STL|LDL)\b", listing))

    def hip_usage(self) -> tuple[int, int]:
        """Vector registers of a lane, and what is spilled to memory; scalar registers spill into vector registers."""
        scratch = number(r"\.private_segment_fixed_size:\s*(\d+)", self.text)
        return number(r"\.vgpr_count:\s*(\d+)", self.text), number(r"\.vgpr_spill_count:\s*(\d+)", self.text) + scratch

    def wide_loads(self) -> int:
        """How many 16-byte loads from global memory the code has."""
        pattern = r"ld\.global\S*\.(?:v4\.[bu]32|v2\.[bu]64)" if self.cuda else r"(?:global|buffer)_load_dwordx4"
        return len(re.findall(pattern, self.text))

    def wide_stores(self) -> int:
        """How many 16-byte stores to global memory the code has."""
        pattern = r"st\.global\S*\.(?:v4\.[bu]32|v2\.[bu]64)" if self.cuda else r"(?:global|buffer)_store_dwordx4"
        return len(re.findall(pattern, self.text))

    def flushes_subnormals(self) -> bool:
        if self.cuda:
            return ".ftz" in self.text
        return number(r"\.amdhsa_float_denorm_mode_32\s+(\d+)", self.text) != 3

    def stray_multiply_adds(self) -> int:
        """In NVIDIA code that fuses two multiply-adds for every square root on purpose: how many there are beyond."""
        fused, roots = (re.findall(pattern, self.text) for pattern in (r"\bfma\.rn\.f32(x2)?", r"\bsqrt\.rn\.f32"))
        return sum(2 if pair else 1 for pair in fused) - 2 * len(roots)

    def fuses_multiply_add(self) -> bool:
        if self.cuda:
            return bool(re.search(r"\bfma\.r[nz]", self.text))
        # Integer division, which AMD has no instruction for, multiplies and adds with these two powers of 2.
        return bool(re.search(r"\bv_(?:pk_)?(?:fma|fmac|mac|mad)_f(?:32|64)(?!.*0x[4c]f800000)", self.text))


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} not found in the compiler's output"
    return int(found[1])


@functools.cache
def tool(name: str) -> str:
    """A binary that Triton's wheel brings, or the one on the PATH."""
    bundled = NVIDIA_TOOLS / name
    return str(bundled) if os.access(bundled, os.X_OK) else name


# ---- offsets in 32 bits ---------------------------------------------------------------------------------------------

# What a 32-bit value that may stand for a position is allowed to do: be widened, or be compared.
HARMLESS = ("arith.extsi", "arith.extui", "arith.cmpi")


def narrow_offsets(ttir: str) -> list[str]:
    """Lines of TTIR that compute positions in 32 bits, and so go wrong above 2^31 elements.

    In 32 bits, what grows with the tensor can only come from a program id, from an argument, from the counter of a
    loop or from a truncation. So each of the first three must be widened before it is used, and the last must not
    occur; what is left in 32 bits are ranges inside a tile and data.
    """
    roots = re.findall(r"(%[\w#]+) = tt\.get_program_id", ttir)
    roots += re.findall(r"(%[\w#]+) = tt\.get_num_programs", ttir)
    roots += re.findall(r"(%\w+): i32\b", ttir[: ttir.index("{\n", ttir.index("tt.func"))])
    roots += re.findall(r"scf\.for (%\w+) = ", ttir) if not re.search(r"scf\.for .* : i64", ttir) else []
    bad = []
    # Bodies of reductions work on data, and older versions of Triton reuse the names of loop counters in them.
    for line in re.sub(r"\^bb0.*?tt\.(?:reduce|scan)\.return", "", ttir, flags=re.S).splitlines():
        found = re.match(r"\s*(?:%[\w#]+(?::\d+)? = )?\"?([\w.]+)\"?[ (](.*)", line)
        if not found or found[1] == "tt.func" or found[1].startswith("tt.get_"):
            continue
        operation, rest = found[1], found[2].split(" loc(")[0]
        if operation == "scf.for":
            continue
        uses = set(re.findall(r"%[\w#]+", rest))
        if uses & set(roots) and operation not in HARMLESS:
            bad.append(line.strip())
        if operation == "arith.trunci" and re.search(r"i64>? to (?:tensor<\S*x)?i32\b", rest):
            bad.append(line.strip())
    return bad
