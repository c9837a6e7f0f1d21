"""Every Triton kernel, compiled ahead of time for GPUs that are not here, with the launch settings users get."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; these tests compile its kernels")

from offprin_kernels import _backend

if _backend.interpreting():
    pytest.skip("TRITON_INTERPRET is set: Triton's kernels are Python functions then", allow_module_level=True)

import triton
import triton.language as tl

from offprin_kernels._launch import Launch
from offprin_kernels.ops.lowrank_select import triton_kernel as select
from offprin_kernels.ops.mask_algebra import triton_kernel as algebra
from offprin_kernels.ops.masked_adamw import contract as adamw
from offprin_kernels.ops.masked_adamw import triton_kernel as masked_adamw
from offprin_kernels.ops.update_scan import contract as c
from offprin_kernels.ops.update_scan import triton_kernel as update_scan

from . import aot

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BITWISE = (c.Rule.parse("bitwise"),)
EVERY_RULE = (*BITWISE, *(c.Rule.parse(*r) for r in (("ulp", 1), ("eta", 1e-3), ("atol", 1e-5), ("storage",))))
MASK, MASK_ROWS = c.Output.MASK, c.Output.MASK | c.Output.ROWS


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scan(shape, base, tuned, rules, outputs, additive=False):
    def launches(arch: str) -> list[Launch]:
        return update_scan.plan(empty(shape, base), empty(shape, tuned), rules, outputs, additive, arch)[1]

    return launches


def counts(*shape: int) -> torch.Tensor:
    return empty(shape, torch.int64)


def mask(columns: int = 4096) -> torch.Tensor:
    return empty((4096, (columns + 63) // 64 * 8))


def dense(columns: int = 4096) -> torch.Tensor:
    return empty((4096, columns), torch.bool)


def source(kind: str, columns: int, dtype: torch.dtype = FP32) -> select.Source:
    if kind == "product":
        return select.product(empty((4096, 128), FP32), empty((128,), FP32), empty((128, columns), FP32))
    if kind == "hash":
        return select.Source(select.HASH.value, 4096, columns, (), 32, stream=-5)
    return select.weight_bits(empty((4096, columns), dtype))


def histogram(kind: str, columns: int, dtype: torch.dtype = FP32, begin: int | None = None):
    bins = counts(select.COPIES, select.BINS)
    return lambda arch: [select.plan_histogram(source(kind, columns, dtype), bins, 0, 1 << 31, 15, arch, begin)]


def mark(kind: str, columns: int, dtype: torch.dtype = FP32):
    return lambda arch: [select.plan_mark(source(kind, columns, dtype), mask(columns), counts(1), 5, 9, 70, arch)]


def step(param, state, rounding: str, masked=False, cohorts=False, tracked=True, aligned=True):
    kind = adamw.Kind(param, state, adamw.Rounding[rounding.upper()])
    tables = masked_adamw.DeviceTables(counts(14), empty((8,), FP32), empty((2,), FP32), counts(1))
    flags = {"masked": masked, "cohorts": cohorts, "tracked": tracked, "aligned": aligned}
    return lambda arch: [masked_adamw.plan(kind, counts(64), tables, arch, **flags)]


class Case(NamedTuple):
    launches: Callable[[str], list[Launch]]  # for an architecture
    cuda_registers: int  # budgets: what Triton 3.4 to 3.9 need, and some room
    hip_registers: int
    wide: str = "cuda hip"  # where loads (of unpack: stores) must have 16 bytes
    dots: bool = False  # multiplies and adds in one rounding on purpose: tl.dot
    steps: bool = False  # AdamW, which fuses twice per square root; AMD divides and takes roots with more of them
    least: tuple[int, int] = (1, 0)  # wide loads and stores


CASES = {
    "scan mask": Case(scan((4096, 4096), BF16, BF16, BITWISE, MASK), 64, 64),
    "scan mask and rows": Case(scan((4096, 14336), BF16, BF16, BITWISE, MASK_ROWS), 64, 64),
    "scan mask, padded rows": Case(scan((4096, 1000), BF16, BF16, BITWISE, MASK), 64, 64),
    "scan mask, odd rows": Case(scan((4096, 1001), BF16, BF16, BITWISE, MASK), 64, 64, ""),
    "scan count, odd length": Case(scan((4097, 4095), BF16, BF16, BITWISE, c.Output(0)), 64, 64),
    "scan eta, fp32": Case(scan((4096, 4096), FP32, FP32, EVERY_RULE[2:3], MASK), 128, 96),
    "scan additive": Case(scan((4096, 4096), BF16, FP32, BITWISE, MASK, True), 96, 64),
    "scan columns": Case(scan((4096, 4096), BF16, BF16, BITWISE, MASK_ROWS | c.Output.COLUMNS), 64, 64),
    "scan everything, bf16": Case(scan((4096, 4096), BF16, BF16, BITWISE, c.Output.all()), 200, 128, "cuda"),
    "scan everything, mixed": Case(scan((8192, 2000), FP16, FP32, EVERY_RULE, c.Output.all()), 255, 192, "cuda"),
    "pack": Case(lambda arch: [algebra.plan_pack(dense(), mask(), arch)], 64, 64),
    "pack, odd rows": Case(lambda arch: [algebra.plan_pack(dense(1001), mask(1001), arch)], 64, 64, ""),
    "unpack": Case(lambda arch: [algebra.plan_unpack(mask(), dense(), arch)], 64, 64, least=(0, 1)),
    "unpack, odd rows": Case(lambda arch: [algebra.plan_unpack(mask(1001), dense(1001), arch)], 64, 64, ""),
    "pairs of 5": Case(lambda arch: [algebra.plan_pairs([mask()] * 5, counts(5, 5), arch)], 96, 192),
    "pairs of 8": Case(lambda arch: [algebra.plan_pairs([mask()] * 8, counts(8, 8), arch)], 128, 224),
    "agreement of 5": Case(lambda arch: [algebra.plan_agreement([mask()] * 5, 4096, counts(6), arch)], 64, 192),
    "agreement of 16": Case(lambda arch: [algebra.plan_agreement([mask()] * 16, 4096, counts(17), arch)], 96, 96),
    "row counts": Case(lambda arch: [algebra.plan_rows(mask(), counts(4096), arch)], 64, 64),
    "column counts": Case(lambda arch: [algebra.plan_columns(mask(), 4096, counts(4096), arch)], 96, 96),
    "select histogram, product": Case(histogram("product", 14336), 128, 128, dots=True),
    "select histogram, product, odd rows": Case(histogram("product", 1001), 128, 128, "", dots=True),
    "select mark, product": Case(mark("product", 14336), 128, 128, dots=True),
    "select mark, product, odd rows": Case(mark("product", 1001), 128, 128, "", dots=True),
    "select places, product": Case(histogram("product", 14336, begin=0), 128, 128, dots=True),
    "select histogram, bf16": Case(histogram("weight", 14336, BF16), 80, 96),
    "select histogram, fp32": Case(histogram("weight", 14336), 80, 96),
    "select histogram, odd rows": Case(histogram("weight", 1001, FP16), 80, 96, ""),
    "select places, bf16": Case(histogram("weight", 14336, BF16, begin=0), 80, 96),
    "select mark, bf16": Case(mark("weight", 14336, BF16), 80, 96),
    "select mark, fp32": Case(mark("weight", 14336), 80, 96),
    "select histogram, hash": Case(histogram("hash", 14336), 80, 112, ""),
    "select mark, hash": Case(mark("hash", 14336), 80, 112, ""),
    # parameter, gradient, two moments of two accesses each if fp32, and what the rounding keeps
    "step nearest": Case(step(BF16, FP32, "nearest"), 144, 144, steps=True, least=(6, 5)),
    "step stochastic": Case(step(BF16, FP32, "stochastic", cohorts=True), 176, 176, steps=True, least=(6, 5)),
    "step kahan": Case(step(BF16, BF16, "kahan"), 176, 144, steps=True, least=(5, 4)),
    "step master": Case(step(BF16, FP32, "master", tracked=False), 168, 160, steps=True, least=(7, 6)),
    "step fp32": Case(step(FP32, FP32, "nearest"), 168, 128, steps=True, least=(8, 6)),
    "step unaligned": Case(step(BF16, FP32, "nearest", aligned=False), 168, 144, "", steps=True),
    "step masked, stochastic": Case(step(BF16, FP32, "stochastic", True, True), 104, 96, "", steps=True),
    "step masked, kahan": Case(step(BF16, BF16, "kahan", True, True), 104, 96, "", steps=True),
}


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """A result from an earlier compiler must not pass for today's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def skip_unlinkable(target: str) -> None:
    if aot.arch(target) == "hip" and not aot.HIP_LINKS:
        pytest.skip(f"Triton {triton.__version__} needs ROCm's linker for {target}; 3.5 and later bring their own")


@functools.cache
def compiled(case: str, target: str) -> list[aot.Compiled]:
    return [aot.Compiled(launch, target) for launch in CASES[case].launches(aot.arch(target))]


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, target: str) -> None:
    """No spills, registers in budget, full-width accesses, 64-bit offsets, subnormals kept, no fused multiply-add."""
    skip_unlinkable(target)
    case, arch = CASES[name], aot.arch(target)
    for kernel in compiled(name, target):
        assert kernel.spilled == 0
        assert kernel.registers <= (case.cuda_registers if arch == "cuda" else case.hip_registers)
        assert not aot.narrow_offsets(kernel.asm["ttir"])
        assert not kernel.flushes_subnormals()
        assert kernel.fuses_multiply_add() == (case.steps or (case.dots and arch == "cuda"))
        assert not (case.steps and arch == "cuda" and kernel.stray_multiply_adds())
    main = compiled(name, target)[0]
    if arch in case.wide.split():
        assert main.wide_loads() >= case.least[0]
        assert main.wide_stores() >= case.least[1]


# ---- the checks themselves ------------------------------------------------------------------------------------------


@triton.jit
def narrow_program_kernel(p_x, n: tl.int64, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, 0, mask=o < n)


@triton.jit
def narrow_late_kernel(p_x, n: tl.int64, BLOCK: tl.constexpr):
    o = (tl.program_id(0) * BLOCK).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(p_x + o, 0, mask=o < n)


@triton.jit
def narrow_argument_kernel(p_x, n: tl.int32, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK) * n
    tl.store(p_x + o, 0)


@triton.jit
def narrow_loop_kernel(p_x, n: tl.int64, BLOCK: tl.constexpr):
    for i in range(100000):
        tl.store(p_x + i * BLOCK + tl.arange(0, BLOCK), 0)


@triton.jit
def narrow_truncated_kernel(p_x, n: tl.int64, BLOCK: tl.constexpr):
    o = (tl.program_id(0).to(tl.int64) * n).to(tl.int32) + tl.arange(0, BLOCK)
    tl.store(p_x + o, 0)


@triton.jit
def wide_kernel(p_x, n: tl.int64, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, 0, mask=o < n)


def compile_toy(kernel) -> aot.Compiled:
    launch = Launch(kernel, 1, {"p_x": empty((64,), torch.int32), "n": 64}, {"BLOCK": 1024}, 4)
    return aot.Compiled(launch, "sm_90")


@pytest.mark.parametrize(
    "kernel",
    [narrow_program_kernel, narrow_late_kernel, narrow_argument_kernel, narrow_loop_kernel, narrow_truncated_kernel],
    ids=lambda kernel: kernel.__name__,
)
def test_offsets_in_32_bits_are_found(kernel) -> None:
    assert aot.narrow_offsets(compile_toy(kernel).asm["ttir"])


def test_offsets_in_64_bits_pass() -> None:
    assert aot.narrow_offsets(compile_toy(wide_kernel).asm["ttir"]) == []


@triton.jit
def spilling_kernel(p_x, n: tl.int64, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    tl.store(p_x + o, tl.sum(b_x) ^ b_x)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_are_found(target: str) -> None:
    skip_unlinkable(target)
    # 1024 values in each thread.
    block = 1024 * aot.TARGETS[target].warp_size
    launch = Launch(spilling_kernel, 1, {"p_x": empty((64,), torch.int32), "n": 64}, {"BLOCK": block}, 1)
    assert aot.Compiled(launch, target).spilled > 0


@triton.jit
def fusable_kernel(p_x, n: tl.int64, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    tl.store(p_x + o, b_x * b_x + b_x)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_fused_multiply_add_is_found(target: str) -> None:
    skip_unlinkable(target)

    class Fused(Launch):
        def options(self):
            return {**super().options(), "enable_fp_fusion": True}

    arguments = (fusable_kernel, 1, {"p_x": empty((64,), torch.float64), "n": 64}, {"BLOCK": 256}, 4)
    assert aot.Compiled(Fused(*arguments), target).fuses_multiply_add()
    assert not aot.Compiled(Launch(*arguments), target).fuses_multiply_add()
