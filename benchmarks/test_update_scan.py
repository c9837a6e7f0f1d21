"""update_scan and mask_algebra on the CPU, as shares of read bandwidth and against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from offprin_kernels import _backend, _native
from offprin_kernels.ops import mask_algebra
from offprin_kernels.ops.update_scan import Output, Rule, RuleCode, scan

from .registry import SHAPES, pair_counts_traffic, update_scan_traffic
from .timing import interleaved, median_ratio, spread

BITWISE = (Rule(RuleCode.BITWISE),)


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two 512 MiB bf16 tensors as RLVR leaves them: normal weights, about a third of them moved by a ULP or a few."""
    generator = torch.Generator().manual_seed(0)
    base, after = (torch.empty(SHAPES["512MiB"], dtype=torch.bfloat16) for _ in range(2))
    for rows in range(0, base.shape[0], 1024):
        block = torch.randn(1024, base.shape[1], generator=generator) * 0.02
        base[rows : rows + 1024] = block
        noise = torch.randn(block.shape, generator=generator) * 3e-5
        after[rows : rows + 1024] = base[rows : rows + 1024].float() + noise
    return base, after


def read_ceiling(tensors, _turn=0) -> None:
    library = _native.library("cpu")
    for tensor in tensors:
        library.read_ceiling(tensor.data_ptr(), tensor.numel() * tensor.element_size(), _backend.threads())


def torch_eta(base: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Definition 2.1 as one would write it."""
    a, b = base.float(), after.float()
    return (b - a).abs() > 1e-3 * torch.maximum(a.abs(), b.abs())


def test_mask_and_counts(benchmark, record, pair) -> None:
    base, after = pair
    mask = torch.empty(base.shape[0], base.shape[1] // 8, dtype=torch.uint8)
    got = scan(base, after, BITWISE, Output.MASK, mask_out=mask, backend="cpu")
    # on normal values Definition 2.1 is the bitwise rule
    for rows in range(0, base.shape[0], 1024):
        plain = torch_eta(base[rows : rows + 1024], after[rows : rows + 1024])
        assert torch.equal(mask_algebra.unpack(mask[rows : rows + 1024], base.shape[1]), plain)
    assert int(got.rule_counts[0, 0]) == int(mask_algebra.row_counts(mask).sum())
    seconds = interleaved(
        {
            "reused": lambda _: scan(base, after, BITWISE, Output.MASK, mask_out=mask, backend="cpu"),
            "fresh": lambda _: scan(base, after, BITWISE, Output.MASK, backend="cpu"),
            "ceiling": lambda _: read_ceiling(pair),
        },
        rounds=15,
    )
    gigabytes = update_scan_traffic(*base.shape, Output(0)).read / 1e9
    for name, bar in (("reused", 0.85), ("fresh", None)):
        record(
            f"update_scan mask + count, {name} memory for the mask",
            median_ratio(seconds["ceiling"], seconds[name]),
            bar,
            "share of read bandwidth, two 512 MiB bf16 tensors",
            seconds=spread(seconds[name]),
            read_gb_per_s=gigabytes / spread(seconds["ceiling"])["median"],
        )
    seconds = interleaved(
        {
            "bitwise": lambda _: scan(base, after, BITWISE, Output.MASK, backend="cpu"),
            "eta": lambda _: scan(base, after, (Rule.parse("eta"),), Output.MASK, backend="cpu"),
            "torch": lambda _: torch_eta(base, after).sum(),
        },
        rounds=9,
    )
    for rule in ("bitwise", "eta"):
        record(
            f"update_scan mask + count, rule {rule}, fresh memory",
            median_ratio(seconds["torch"], seconds[rule]),
            60,
            "times the speed of the PyTorch expression of the eta rule",
            seconds=spread(seconds[rule]),
            torch_seconds=spread(seconds["torch"]),
        )
    benchmark.pedantic(scan, args=(base, after, BITWISE, Output.MASK), kwargs={"backend": "cpu"}, rounds=5)


def test_all_outputs(benchmark, record, pair) -> None:
    base, after = pair
    got = scan(base, after, BITWISE, Output.all(), backend="cpu")
    want = scan(base[:256], after[:256], BITWISE, Output.all(), backend="reference")
    part = scan(base[:256], after[:256], BITWISE, Output.all(), backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(part[:-1], want[:-1], strict=True))
    assert torch.allclose(part.norms, want.norms, rtol=1e-12)
    assert int(got.row_counts.sum()) == int(got.col_counts.sum()) == int(got.exponent_histogram[1].sum())
    mask = torch.empty_like(got.mask)
    seconds = interleaved(
        {
            "reused": lambda _: scan(base, after, BITWISE, Output.all(), mask_out=mask, backend="cpu"),
            "fresh": lambda _: scan(base, after, BITWISE, Output.all(), backend="cpu"),
            "ceiling": lambda _: read_ceiling(pair),
        },
        rounds=11,
    )
    for name, bar in (("reused", 0.5), ("fresh", None)):
        record(
            f"update_scan all outputs, {name} memory for the mask",
            median_ratio(seconds["ceiling"], seconds[name]),
            bar,
            "share of read bandwidth, two 512 MiB bf16 tensors",
            seconds=spread(seconds[name]),
        )
    benchmark.pedantic(scan, args=(base, after, BITWISE, Output.all()), kwargs={"backend": "cpu"}, rounds=5)


def test_pair_counts(benchmark, record) -> None:
    rows, columns = SHAPES["4GB"]
    generator = torch.Generator().manual_seed(0)
    masks = [
        torch.randint(0, 256, (rows, columns // 8), dtype=torch.uint8, generator=generator) for _ in range(5)
    ]  # 256 MiB each
    got = mask_algebra.pair_counts(masks, backend="cpu")
    slices = [mask[:64] for mask in masks]
    want = mask_algebra.pair_counts(slices, backend="reference")
    assert torch.equal(mask_algebra.pair_counts(slices, backend="cpu"), want)
    assert int(got[0, 0]) == int(mask_algebra.row_counts(masks[0]).sum())
    seconds = interleaved(
        {
            "ours": lambda _: mask_algebra.pair_counts(masks, backend="cpu"),
            "ceiling": lambda _: read_ceiling(masks),
        },
        rounds=15,
    )
    record(
        "mask_algebra pair counts, 5 runs",
        median_ratio(seconds["ceiling"], seconds["ours"]),
        0.85,
        "share of read bandwidth over the packed words",
        read_gb_per_s=pair_counts_traffic(rows, columns, 5).read / 1e9 / spread(seconds["ceiling"])["median"],
        seconds=spread(seconds["ours"]),
    )
    benchmark.pedantic(mask_algebra.pair_counts, args=(masks,), kwargs={"backend": "cpu"}, rounds=5)
