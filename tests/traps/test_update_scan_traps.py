"""One test per way in which a scan can be silently wrong, on the default CPU path."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from offprin_kernels import BitMask, _native, update_mask, update_scan
from offprin_kernels.ops.update_scan import Output, Rule, RuleCode, scan

from ..ops.weights import from_codes, tuned, weights

BITWISE = (Rule(RuleCode.BITWISE),)


def test_more_than_two_to_the_31_elements() -> None:
    """int32 offsets would wrap. The untouched pages are the kernel's zero page, so this needs little memory."""
    rows, columns = (1 << 16) + 3, 1 << 15
    base = torch.zeros(rows, columns, dtype=torch.bfloat16)
    after = torch.zeros(rows, columns, dtype=torch.bfloat16)
    places = [(0, 1), (rows // 2, 77), (rows - 4, columns - 1), (rows - 1, columns - 1)]
    for row, column in places:
        after[row, column] = 1.0
    assert base.numel() > 2**31
    got = update_scan(base, after, outputs=["mask", "rows", "columns", "exponent_histogram"])
    assert got.changed == len(places) and got.exponent_histogram[:, 0].tolist() == [rows * columns, len(places)]
    assert got.row_counts.nonzero().flatten().tolist() == [row for row, _ in places]
    assert got.col_counts[[1, 77, columns - 1]].tolist() == [1, 1, 2]
    for row, column in places:
        assert got.mask[row : row + 1].to_dense().nonzero().tolist() == [[0, column]]


def test_zeros_of_either_sign_are_equal() -> None:
    zero = torch.zeros(3, 70, dtype=torch.bfloat16)
    assert update_mask(zero, -zero).count() == 0
    assert update_mask(zero, -zero, rule="storage").count() == 210


def test_nan_equals_nan_and_nothing_else() -> None:
    nans = from_codes(torch.tensor([0x7FC0, 0xFFC1, 0x7F81]))
    assert update_mask(nans, nans.flip(0)).count() == 0
    for rule in ("bitwise", "eta"):
        assert update_mask(nans, torch.ones(3, dtype=torch.bfloat16), rule).count() == 3
    assert update_mask(nans, torch.ones(3, dtype=torch.bfloat16), "ulp", 70_000).count() == 3


def test_infinity_is_a_change_under_eta() -> None:
    one, infinite = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), float("inf"), dtype=torch.bfloat16)
    assert update_mask(one, infinite, "eta").count() == update_mask(-infinite, infinite, "eta").count() == 1
    assert update_mask(infinite, infinite, "eta").count() == 0


def test_flush_to_zero_does_not_hide_subnormals() -> None:
    code = (
        "import torch\n"
        "from offprin_kernels import update_scan\n"
        "assert torch.set_flush_denormal(True)\n"
        "a = torch.tensor([[1, 2, 3, 4] * 40], dtype=torch.int16).view(torch.bfloat16)\n"
        "b = torch.tensor([[2, 2, 3, 4] * 40], dtype=torch.int16).view(torch.bfloat16)\n"
        "s = update_scan(a, b, also=[('atol', 0.0), ('eta', 0.1)])\n"
        "flushed = torch.tensor(1e-40) * 1.0 == 0\n"
        "print(list(s.counts.values()), s.zero_to_nonzero, s.norms.update_squared > 0, flushed)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "[40, 40, 40] 0 True tensor(True)", done.stdout + done.stderr


def test_rounding_to_nearest_even_before_comparing() -> None:
    base = torch.tensor([[1.0, 1.0, 1.0, 1 + 2 / 128]])
    after = torch.tensor([[1 + 1 / 256, 1 + 1.01 / 256, 1 - 1 / 512, 1 + 3 / 256]])
    # a tie at an even neighbour rounds back; just above it does not; below 1 the ULP is half as large
    assert update_mask(base, after).to_dense().tolist() == [[False, True, False, False]]


def test_non_contiguous_views_are_read_as_they_look() -> None:
    base = weights((60, 80))
    after = tuned(base)
    assert update_mask(base.T, after.T) == BitMask.from_dense((base != after).T)
    assert update_mask(base[:, ::3], after[:, ::3]) == BitMask.from_dense((base != after)[:, ::3])


def test_column_counters_do_not_wrap() -> None:
    base = torch.zeros(70_001, 65, dtype=torch.bfloat16)
    assert update_scan(base, base + 1, outputs="columns").col_counts.unique().tolist() == [70_001]


def test_padding_bits_stay_zero() -> None:
    base = torch.zeros(5, 65, dtype=torch.bfloat16)
    mask = update_mask(base, base + 1)
    assert mask.count() == 325 and int(mask.words[:, 9:].sum()) == 0


@pytest.mark.parametrize("shape", [(1, 3_000_001), (2_000_003, 1), (700, 5003)])
def test_result_does_not_depend_on_threads_or_instruction_set(shape, monkeypatch) -> None:
    base = weights(shape)
    after = tuned(base)
    found = []
    for isa in _native.library("cpu").isas():
        for threads in ("1", "2", "7"):
            monkeypatch.setenv("OFFPRIN_CPU_ISA", isa)
            monkeypatch.setenv("OFFPRIN_NUM_THREADS", threads)
            found.append(scan(base, after, BITWISE, Output.all(), backend="cpu"))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)  # float sums too: the order is fixed


def test_forced_instruction_set_never_falls_back(monkeypatch) -> None:
    monkeypatch.setenv("OFFPRIN_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="OFFPRIN_CPU_ISA=avx1024"):
        update_mask(torch.zeros(2), torch.zeros(2), backend="cpu")


def big_count() -> int:
    base = torch.zeros(2048, 4096, dtype=torch.bfloat16)
    return update_mask(base, base + 1).count()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_scan() -> None:
    """The parent's worker threads do not exist in the child; data loaders fork."""
    assert big_count() == 2048 * 4096
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(torch_single_then_count).get(timeout=60) == 2048 * 4096
    assert big_count() == 2048 * 4096


def torch_single_then_count() -> int:
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    os.environ["OFFPRIN_NUM_THREADS"] = "3"
    return big_count()


def test_concurrent_callers_do_not_mix() -> None:
    inputs = [(weights((300, 4097), seed=i), tuned(weights((300, 4097), seed=i), seed=50 + i)) for i in range(6)]
    want = [int((a != b).sum()) for a, b in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            assert list(pool.map(lambda pair: update_mask(*pair).count(), inputs)) == want
