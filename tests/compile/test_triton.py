"""Every Triton kernel, compiled ahead of time for GPUs that are not here, with the launch settings users get."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; these tests compile its kernels")

from offprin_kernels import _backend  # noqa: E402

if _backend.interpreting():
    pytest.skip("TRITON_INTERPRET is set: Triton's kernels are Python functions then", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from offprin_kernels._launch import Launch  # noqa: E402
from offprin_kernels.ops.mask_algebra import triton_kernel as algebra  # noqa: E402
from offprin_kernels.ops.update_scan import contract as c  # noqa: E402
from offprin_kernels.ops.update_scan import triton_kernel as update_scan  # noqa: E402

from . import aot  # noqa: E402

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


# name: (launches for an architecture, budget of registers, 16-byte loads are required)
CASES = {
    "scan mask": (scan((4096, 4096), BF16, BF16, BITWISE, MASK), 64, True),
    "scan mask and rows": (scan((4096, 14336), BF16, BF16, BITWISE, MASK_ROWS), 64, True),
    "scan mask, padded rows": (scan((4096, 1000), BF16, BF16, BITWISE, MASK), 64, True),
    "scan mask, odd rows": (scan((4096, 1001), BF16, BF16, BITWISE, MASK), 96, False),
    "scan count, odd length": (scan((4097, 4095), BF16, BF16, BITWISE, c.Output(0)), 64, True),
    "scan eta, fp32": (scan((4096, 4096), FP32, FP32, EVERY_RULE[2:3], MASK), 128, True),
    "scan additive": (scan((4096, 4096), BF16, FP32, BITWISE, MASK, True), 96, True),
    "scan columns": (scan((4096, 4096), BF16, BF16, BITWISE, MASK_ROWS | c.Output.COLUMNS), 96, True),
    "scan everything, bf16": (scan((4096, 4096), BF16, BF16, BITWISE, c.Output.all()), 168, True),
    "scan everything, mixed": (scan((4096, 1000), FP16, FP32, EVERY_RULE, c.Output.all()), 255, True),
    "pack": (lambda arch: [algebra.plan_pack(dense(), mask(), arch)], 64, True),
    "pack, odd rows": (lambda arch: [algebra.plan_pack(dense(1001), mask(1001), arch)], 128, False),
    "unpack": (lambda arch: [algebra.plan_unpack(mask(), dense(), arch)], 64, False),
    "unpack, odd rows": (lambda arch: [algebra.plan_unpack(mask(1001), dense(1001), arch)], 168, False),
    "pairs of 5": (lambda arch: [algebra.plan_pairs([mask()] * 5, counts(5, 5), arch)], 96, True),
    "pairs of 8": (lambda arch: [algebra.plan_pairs([mask()] * 8, counts(8, 8), arch)], 168, True),
    "agreement of 5": (lambda arch: [algebra.plan_agreement([mask()] * 5, 4096, counts(6), arch)], 96, True),
    "agreement of 16": (lambda arch: [algebra.plan_agreement([mask()] * 16, 4096, counts(17), arch)], 128, True),
    "row counts": (lambda arch: [algebra.plan_rows(mask(), counts(4096), arch)], 64, True),
    "column counts": (lambda arch: [algebra.plan_columns(mask(), 4096, counts(4096), arch)], 128, False),
}


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """A result from an earlier compiler must not pass for today's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@functools.cache
def compiled(case: str, target: str) -> list[aot.Compiled]:
    launches, _, _ = CASES[case]
    return [aot.Compiled(launch, target) for launch in launches(aot.arch(target))]


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernel(case: str, target: str) -> None:
    """No spills, registers in budget, full-width loads, 64-bit offsets, subnormals kept, no fused multiply-add."""
    _, budget, wide = CASES[case]
    for kernel in compiled(case, target):
        assert kernel.spilled == 0
        assert kernel.registers <= budget
        assert not aot.narrow_offsets(kernel.asm["ttir"])
        assert not kernel.flushes_subnormals()
        assert not kernel.fuses_multiply_add()
    if wide:
        assert compiled(case, target)[0].wide_loads() > 0


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
    tl.debug_barrier()
    tl.store(p_x + o, tl.cumsum(b_x, 0) ^ b_x)


def test_spills_are_found() -> None:
    launch = Launch(spilling_kernel, 1, {"p_x": empty((64,), torch.int32), "n": 64}, {"BLOCK": 16384}, 1)
    assert aot.Compiled(launch, "sm_90").spilled > 0
    assert aot.Compiled(launch, "gfx942").spilled > 0
