"""The Triton kernels of topk_svd, compiled ahead of time as test_triton.py does for the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; these tests compile its kernels")

from offprin_kernels import _backend

if _backend.interpreting():
    pytest.skip("TRITON_INTERPRET is set: Triton's kernels are Python functions then", allow_module_level=True)

import triton

from offprin_kernels._launch import Launch
from offprin_kernels.ops.subspace import triton_launch as t

from . import aot

BF16, FP32 = torch.bfloat16, torch.float32
TENSOR_CORES = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "sm_100": r"\btcgen05\.mma",
    "gfx942": r"\bv_mfma_f32_\S+_bf16",
}


def empty(shape: tuple[int, ...], dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(*shape: int) -> torch.Tensor:
    return empty(shape, BF16)


def product(x: torch.Tensor, a: torch.Tensor, pieces: int, out: torch.dtype = FP32, part: int = t.ALL):
    return lambda arch: t.plan_product(x, a, pieces, out, arch, part)[1]


class Case(NamedTuple):
    launches: Callable[[str], list[Launch]]  # for an architecture
    cuda_registers: int  # budgets: what Triton 3.4 to 3.9 need, and some room
    hip_registers: int
    wide: bool = True  # loads, or copies into shared memory, of 16 bytes
    warp_groups: bool = True  # tiles of 64 rows, which newer tensor cores take whole


WIDE, BLOCK = weight(1, 14336, 4096), empty((1, 256, 4096))
CASES = {
    "forward": Case(product(BLOCK, WIDE.mT, 2), 255, 192),
    "backward": Case(product(empty((1, 256, 14336)), WIDE, 2), 255, 192),
    "backward, three pieces": Case(product(empty((1, 256, 14336)), WIDE, 3), 224, 160),
    "forward, odd rows": Case(product(empty((1, 250, 4095)), weight(1, 14336, 4095).mT, 2), 255, 160, wide=False),
    "forward, experts": Case(product(empty((8, 256, 4096)), weight(8, 1536, 4096).mT, 2), 255, 192),
    "rough, there": Case(product(BLOCK, WIDE.mT, 1, BF16), 192, 160),
    "rough, back": Case(product(weight(1, 256, 14336), WIDE, 1), 160, 128),
    "probe": Case(product(empty((1, 16, 14336)), WIDE, 1), 128, 96, warp_groups=False),
    "gram of a weight": Case(product(WIDE.mT, WIDE, 2, FP32, t.LOWER_RESULT), 255, 192),
    "gram of a block": Case(product(BLOCK, BLOCK.mT, 3, FP32, t.LOWER_RESULT), 192, 192),
    "triangle": Case(product(empty((1, 256, 256)), BLOCK, 3, FP32, t.LOWER_LEFT), 192, 192),
}


def recurrence(length: int):
    row = empty((1, 256, 1))
    return lambda arch: [t.plan_recurrence(*[empty((1, 256, length))] * 4, row, row, row, empty((1, 1, 1)))]


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """A result from an earlier compiler must not pass for today's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(launches: Callable[[str], list[Launch]], target: str) -> list[aot.Compiled]:
    if aot.arch(target) == "hip" and not aot.HIP_LINKS:
        pytest.skip(f"Triton {triton.__version__} needs ROCm's linker for {target}; 3.5 and later bring their own")
    return [aot.Compiled(launch, target) for launch in launches(aot.arch(target))]


def check(kernel: aot.Compiled, registers: int) -> None:
    assert kernel.spilled == 0
    assert kernel.registers <= registers
    assert not aot.narrow_offsets(kernel.asm["ttir"])
    assert not kernel.flushes_subnormals()


def wide_copies(kernel: aot.Compiled) -> int:
    """16-byte loads, and copies of 16 bytes straight into shared memory."""
    return kernel.wide_loads() + len(re.findall(r"cp\.async\.cg\S* .*\b0x10\b", kernel.text))


def narrow_copies(kernel: aot.Compiled) -> int:
    return len(re.findall(r"cp\.async\.c[ag]\S* ", kernel.text)) - len(
        re.findall(r"cp\.async\.c[ag]\S* .*\b0x10\b", kernel.text)
    )


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_products(name: str, target: str) -> None:
    """No spills, registers in budget, 64-bit offsets, tensor cores, every tile fetched 16 bytes at a time."""
    case = CASES[name]
    main, *rest = compiled(case.launches, target)
    hip = aot.arch(target) == "hip"
    check(main, case.hip_registers if hip else case.cuda_registers)
    cores = TENSOR_CORES[target] if case.warp_groups or hip else TENSOR_CORES["sm_80"]
    assert re.search(cores, main.text)
    assert hip or not main.fuses_multiply_add()
    # pieces are rounded to nearest, as the interpreter's integer helpers do
    assert not re.search(r"cvt\.r[zmp]\S*bf16", main.text)
    if case.wide:
        assert wide_copies(main) > 0 and narrow_copies(main) == 0
    for kernel in rest:
        check(kernel, 80)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["backward", "gram of a weight", "gram of a block"])
def test_tiles_are_added_with_rounding(name: str, target: str) -> None:
    """Not within tensor cores, which truncate: the compiler has not merged both additions."""
    launch = CASES[name].launches("cuda")[0]
    text = aot.Compiled(launch, target).asm["ttir"]
    tile = rf"tensor<{launch.constexprs['BLOCK_M']}x{launch.constexprs['BLOCK_N']}xf32>"
    assert re.search(rf"arith\.addf .* : {tile}", text)
    # the loop's own sum is not what products are added to
    carried = re.search(r"iter_args\((%\w+) = ", text)
    assert carried and not re.search(rf"tt\.dot .*{carried[1]}\b", text)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("length", [4096, 4095])
def test_recurrence(length: int, target: str) -> None:
    (kernel,) = compiled(recurrence(length), target)
    check(kernel, 80)
    if length == 4096:
        assert kernel.wide_loads() >= 4 and kernel.wide_stores() >= 1
    # AMD divides so, which is how its division becomes exact
    assert aot.arch(target) == "hip" or not kernel.fuses_multiply_add()
