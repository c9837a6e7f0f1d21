"""lowrank_select: every backend against numpy's stable sort in fp64; exact counts, ties by lowest index."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from offprin_kernels import _native, packing
from offprin_kernels._backend import interpreting
from offprin_kernels.ops import lowrank_select as op
from offprin_kernels.ops import mask_algebra

from .selections import SHAPES, counts, dense, on, smallest
from .weights import DTYPES, all_patterns

BACKENDS = op.BACKENDS
EMPTY = [(0, 5), (5, 0), (0, 0)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors(m: int, k: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, right = torch.randn(m, k, generator=generator(seed)), torch.randn(k, n, generator=generator(seed + 1))
    return left, torch.rand(k, generator=generator(seed + 2)).sort(descending=True).values, right


# ---- the largest entries of a product -------------------------------------------------------------------------------


def check_product(words: torch.Tensor, left, values, right, count: int) -> int:
    """Exact count; entries picked wrongly lie within twice the rounding error of the threshold. Returns how many."""
    found = dense(words, right.shape[1])
    assert found.sum() == count
    a, s, b = left.double().numpy(), values.double().numpy(), right.double().numpy()
    exact, magnitudes = np.abs((a * s) @ b), (np.abs(a) * np.abs(s)) @ np.abs(b)
    wrong = found != smallest(-exact, count)
    if wrong.any():
        # A sum of k rounded products: k + 1 roundings for each term (Higham, section 3.1).
        error = (len(s) + 1) * 2.0**-24 * magnitudes.max()
        threshold = np.sort(exact, axis=None)[-count]
        assert np.abs(exact[wrong] - threshold).max() <= 2 * error
    return int(wrong.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_product(backend, device, shape) -> None:
    m, n = shape
    for k in sorted({1, min(3, *shape), min(shape)}):
        given = factors(m, k, n)
        for count in counts(m * n):
            words = op.select_lowrank(*on(device, given), count, backend=backend)
            assert check_product(words, *given, count) <= 2


def test_wide_ranks_cross_every_block(backend, device) -> None:
    for m, k, n in [(9, 100, 1100), (300, 17, 65)]:
        given = factors(m, k, n)
        words = op.select_lowrank(*on(device, given), m * n // 3, backend=backend)
        assert check_product(words, *given, m * n // 3) <= 4


def test_ties_of_a_product_go_to_the_lowest_index(backend, device) -> None:
    # Small integers: every sum is exact, so that all backends agree with fp64 to the bit.
    left = torch.randint(-2, 3, (90, 6), generator=generator()).float()
    right = torch.randint(-2, 3, (6, 120), generator=generator(1)).float()
    left[7], left[80] = left[3], -left[3]
    values = torch.tensor([4.0, 2.0, 2.0, 1.0, 1.0, 0.5])
    exact = -np.abs((left * values).numpy() @ right.numpy())
    for count in counts(left.shape[0] * right.shape[1]):
        words = op.select_lowrank(*on(device, (left, values, right)), count, backend=backend)
        np.testing.assert_array_equal(dense(words, 120), smallest(exact, count))


def test_zero_product_and_rank_zero(backend, device) -> None:
    left, values, right = factors(40, 4, 130)
    for given in [(left, values * 0, right), (left[:, :0], values[:0], right[:0])]:
        words = op.select_lowrank(*on(device, given), 777, backend=backend)
        np.testing.assert_array_equal(dense(words, 130).ravel().nonzero()[0], np.arange(777))


def test_strided_factors(backend, device) -> None:
    left, values, right = factors(50, 8, 70)
    want = op.select_lowrank(*on(device, (left, values, right)), 900, backend=backend)
    views = (left.T.contiguous().T, torch.stack([values, values], 1)[:, 0], right.T.contiguous().T)
    assert torch.equal(op.select_lowrank(*on(device, views), 900, backend=backend), want)
    cut = torch.zeros(60, 20)
    cut[:50, :8] = left
    assert torch.equal(op.select_lowrank(*on(device, (cut[:50, :8], values, right)), 900, backend=backend), want)


def test_factors_that_are_not_finite_are_named(backend, device) -> None:
    for i, name in enumerate(("left", "values", "right")):
        for bad in (float("nan"), float("inf"), float("-inf")):
            given = [factor.clone() for factor in factors(6, 2, 7)]
            given[i].view(-1)[1] = bad
            with pytest.raises(ValueError, match=f"{name} holds NaN or Inf"):
                op.select_lowrank(*on(device, given), 3, backend=backend)
    huge = [factor * 1e30 for factor in factors(6, 2, 7)]
    with pytest.raises(ValueError, match="overflows fp32"):
        op.select_lowrank(*on(device, huge), 3, backend=backend)


# ---- the smallest entries of a weight -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight(backend, device, shape, dtype) -> None:
    weight = torch.randn(shape, generator=generator()).to(dtype)
    for count in counts(weight.numel()):
        words = op.select_smallest(weight.to(device), count, backend=backend)
        np.testing.assert_array_equal(dense(words, shape[1]), smallest(weight.abs().double().numpy(), count))


def test_every_finite_pattern(backend, device) -> None:
    weight = all_patterns()
    weight = weight[weight.isfinite()]
    for count in (3, 20001, len(weight) - 1):
        words = op.select_smallest(weight.to(device), count, backend=backend)
        np.testing.assert_array_equal(dense(words, len(weight))[0], smallest(weight.abs().double().numpy(), count))


def test_signed_zeros_are_equal(backend, device) -> None:
    for dtype in DTYPES:
        weight = torch.tensor([[1.0, -0.0, 0.0, -0.0, 1e-6]], dtype=dtype)
        found = dense(op.select_smallest(weight.to(device), 2, backend=backend), 5)
        np.testing.assert_array_equal(found, [[False, True, True, False, False]])


@pytest.mark.parametrize("count", [1, 64, 4097, 65536, 65537, 99_999, 132_000])
def test_constant_matrix(backend, device, count) -> None:
    weight = torch.full((120, 1100), -0.5)
    words = op.select_smallest(weight.to(device), count, backend=backend)
    np.testing.assert_array_equal(dense(words, 1100).ravel().nonzero()[0], np.arange(count))


def test_bucket_too_full_to_list(backend, device) -> None:
    # One bucket of the top bits holds everything, few values and many: narrowed by low bits, then by place.
    for values in (3, 30_000):
        steps = torch.randint(0, values, (130, 1000), generator=generator(), dtype=torch.int32)
        weight = (steps + 0x3F800000).view(torch.float32)
        for count in (1, 43_000, 100_000):
            words = op.select_smallest(weight.to(device), count, backend=backend)
            np.testing.assert_array_equal(dense(words, 1000), smallest(steps.numpy(), count))


def test_duplicated_rows(backend, device) -> None:
    weight = torch.randn(1, 300, generator=generator()).bfloat16().repeat(20, 1)
    words = op.select_smallest(weight.to(device), 1234, backend=backend)
    np.testing.assert_array_equal(dense(words, 300), smallest(weight.abs().float().numpy(), 1234))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_that_is_not_finite(backend, device, dtype) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        weight = torch.ones(3, 70, dtype=dtype)
        weight[2, 69] = bad
        with pytest.raises(ValueError, match="weight holds NaN or Inf"):
            op.select_smallest(weight.to(device), 5, backend=backend)
    largest = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    assert dense(op.select_smallest(largest.to(device), 4, backend=backend), 3).sum() == 4


def test_leading_dimensions_are_rows(backend, device) -> None:
    weight = torch.randn(3, 4, 50, generator=generator())
    words = op.select_smallest(weight.to(device), 100, backend=backend)
    assert torch.equal(words, op.select_smallest(weight.reshape(12, 50).to(device), 100, backend=backend))
    turned = weight.transpose(0, 2)
    words = op.select_smallest(turned.to(device), 100, backend=backend)
    np.testing.assert_array_equal(dense(words, 3), smallest(turned.abs().double().numpy().reshape(200, 3), 100))


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", EMPTY)
def test_empty(backend, device, shape) -> None:
    m, n = shape
    for words in (
        op.select_lowrank(*on(device, factors(m, 2, n)), 0, backend=backend),
        op.select_smallest(torch.zeros(shape, device=device), 0, backend=backend),
        op.select_random(m, n, 0, 1, device=device, backend=backend),
    ):
        assert words.shape == (m, packing.row_bytes(n))


@pytest.mark.skipif(interpreting(), reason="the compiled library runs in the main test process")
def test_threads_and_instruction_sets_change_nothing(monkeypatch) -> None:
    given, weight = factors(700, 40, 1100), torch.zeros(700, 1100)
    weight[::3] = torch.randn(1100, generator=generator())

    def masks() -> list[torch.Tensor]:
        found = [op.select_lowrank(*given, count, backend="cpu") for count in (1, 300_000)]
        found += [op.select_smallest(w, 200_001, backend="cpu") for w in (weight, weight.bfloat16())]
        return [*found, op.select_random(700, 1100, 400_000, 5, backend="cpu")]

    want = masks()
    for threads in ("1", "2", "5"):
        for isa in _native.library("cpu").isas():
            monkeypatch.setenv("OFFPRIN_NUM_THREADS", threads)
            monkeypatch.setenv("OFFPRIN_CPU_ISA", isa)
            assert all(torch.equal(a, b) for a, b in zip(masks(), want, strict=True)), (threads, isa)


MEMORY = """
import torch
from offprin_kernels.ops import lowrank_select as op
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
m, n, k = 4096, 4096, 64
given = torch.randn(m, k), torch.rand(k), torch.randn(k, n)
op.select_lowrank(*(t[:8, :8] if t.dim() == 2 else t[:8] for t in given), 5, backend="cpu")
open("/proc/self/clear_refs", "w").write("5")
before = peak()
op.select_lowrank(*given, m * n // 2, backend="cpu")
print((peak() - before - m * n // 8) / (4 * m * n))
"""


@pytest.mark.skipif(interpreting() or not sys.platform.startswith("linux"), reason="reads Linux's count of peak memory")
def test_no_reconstruction_in_memory() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OFFPRIN_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.05


def test_two_passes_that_disagree_are_an_error(backend, device, monkeypatch) -> None:
    if backend != "triton":
        pytest.skip("only the Triton backend's passes can be parted from outside")
    from offprin_kernels.ops.lowrank_select import triton_kernel

    plan = triton_kernel.plan_mark
    monkeypatch.setattr(triton_kernel, "plan_mark", lambda *args: plan(*args[:3], args[3] + (1 << 20), *args[4:]))
    with pytest.raises(RuntimeError, match="changed while it ran"):
        op.select_smallest(torch.randn(30, 40, generator=generator()).to(device), 600, backend=backend)


@pytest.mark.traced
def test_opcheck(backend, device) -> None:
    ops = torch.ops.offprin
    torch.library.opcheck(ops.select_lowrank, (*on(device, factors(4, 2, 70)), 30, backend))
    torch.library.opcheck(ops.select_smallest, (torch.randn(2, 3, 70).to(device), 30, backend))
    torch.library.opcheck(ops.select_random, (4, 70, 30, 1, device, backend))


def test_bad_input() -> None:
    left, values, right = factors(4, 2, 70)
    with pytest.raises(TypeError, match=r"right is torch\.float64"):
        op.select_lowrank(left, values, right.double(), 1)
    with pytest.raises(ValueError, match="left \\[m, k\\], values \\[k\\] and right \\[k, n\\]"):
        op.select_lowrank(left, values[:1], right, 1)
    for count in (-1, 281):
        with pytest.raises(ValueError, match=r"0 \.\. 280"):
            op.select_lowrank(left, values, right, count)
        with pytest.raises(ValueError, match=r"0 \.\. 280"):
            op.select_smallest(torch.zeros(4, 70), count)
        with pytest.raises(ValueError, match=r"0 \.\. 280"):
            op.select_random(4, 70, count, 0)
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        op.select_smallest(torch.zeros(4, 70).double(), 1)
    with pytest.raises(ValueError, match="seed"):
        op.select_random(4, 70, 1, -1)
    with pytest.raises(ValueError, match="sizes start at 0"):
        op.select_random(-4, 70, 0, 1)
    words = op.select_random(4, 70, 30, 1)
    assert int(mask_algebra.row_counts(words).sum()) == 30
