"""mask_algebra: every backend against the reference and against numpy's packbits, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offprin_kernels import packing
from offprin_kernels.ops import mask_algebra as op

BACKENDS = op.BACKENDS
SHAPES = [(1, 1), (1, 64), (3, 63), (3, 65), (17, 130), (64, 512), (1, 5000), (300, 3), (5, 0), (0, 5), (0, 0)]


def bits(shape, seed: int = 0, density: float = 0.3) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def packed(shape, seed: int = 0, density: float = 0.3) -> torch.Tensor:
    return op.pack(bits(shape, seed, density), backend="reference")


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_is_numpy_packbits(backend, device, shape) -> None:
    dense = bits(shape)
    words = op.pack(dense.to(device), backend=backend).cpu()
    assert words.shape == (shape[0], packing.row_bytes(shape[1]))
    want = np.zeros(words.shape, dtype=np.uint8)
    plain = np.packbits(dense.numpy(), axis=1, bitorder="little")
    want[:, : plain.shape[1]] = plain
    np.testing.assert_array_equal(words.numpy(), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_inverts_pack(backend, device, shape) -> None:
    dense = bits(shape)
    words = op.pack(dense, backend="reference").to(device)
    assert torch.equal(op.unpack(words, shape[1], backend=backend).cpu(), dense)


def test_pack_takes_any_nonzero_byte_as_true(backend, device) -> None:
    odd = torch.arange(0, 200, dtype=torch.uint8).view(2, 100).to(device)
    words = op.pack(odd.view(torch.bool), backend=backend)
    assert torch.equal(op.unpack(words.cpu(), 100, backend="reference"), odd.cpu() != 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_row_and_column_counts(backend, device, shape) -> None:
    dense, words = bits(shape), packed(shape).to(device)
    assert op.row_counts(words, backend=backend).tolist() == dense.sum(1).tolist()
    assert op.col_counts(words, shape[1], backend=backend).tolist() == dense.sum(0).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("shape", [(1, 1), (9, 200), (40, 1024), (3, 0)])
def test_pair_counts_and_agreement(backend, device, count, shape) -> None:
    dense = [bits(shape, seed, 0.1 + 0.07 * seed) for seed in range(count)]
    masks = [op.pack(d, backend="reference").to(device) for d in dense]
    counts = op.pair_counts(masks, backend=backend).cpu()
    want = torch.tensor([[int((a & b).sum()) for b in dense] for a in dense])
    assert torch.equal(counts, want)
    votes = torch.stack(dense).sum(0).flatten()
    assert torch.equal(op.agreement(masks, shape[1], backend=backend).cpu(), torch.bincount(votes, minlength=count + 1))


def test_many_masks(backend, device) -> None:
    dense = [bits((5, 100), seed, 0.5) for seed in range(40)]
    masks = [op.pack(d, backend="reference").to(device) for d in dense]
    votes = torch.stack(dense).sum(0).flatten()
    assert torch.equal(op.agreement(masks, 100, backend=backend).cpu(), torch.bincount(votes, minlength=41))
    want = op.pair_counts([mask.cpu() for mask in masks], backend="reference")
    assert torch.equal(op.pair_counts(masks, backend=backend).cpu(), want)


def test_full_masks_do_not_overflow_counters(backend, device) -> None:
    full = op.pack(torch.ones(70_000 if backend == "cpu" else 700, 64, dtype=torch.bool), backend="reference").to(
        device
    )
    assert op.col_counts(full, 64, backend=backend).unique().tolist() == [full.shape[0]]


def test_row_slices_are_taken_as_they_are(backend, device) -> None:
    words = packed((20, 200)).to(device)
    part = words[3:11]
    assert torch.equal(op.row_counts(part, backend=backend), op.row_counts(words, backend=backend)[3:11])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 12), columns=st.integers(0, 300), seed=st.integers(0, 999), density=st.floats(0, 1))
def test_any_shape(backend, device, rows, columns, seed, density) -> None:
    dense = bits((rows, columns), seed, density)
    words = op.pack(dense.to(device), backend=backend)
    assert torch.equal(op.unpack(words, columns, backend=backend).cpu(), dense)
    assert int(op.pair_counts([words], backend=backend)) == int(dense.sum())
    assert int(op.row_counts(words, backend=backend).sum()) == int(op.col_counts(words, columns, backend=backend).sum())


@pytest.mark.traced
def test_opcheck(backend, device) -> None:
    words = packed((4, 70)).to(device)
    ops = torch.ops.offprin
    torch.library.opcheck(ops.mask_pack, (bits((4, 70)).to(device), backend))
    torch.library.opcheck(ops.mask_unpack, (words, 70, backend))
    torch.library.opcheck(ops.mask_pair_counts, ([words, words.clone()], backend))
    torch.library.opcheck(ops.mask_agreement, ([words, words.clone()], 70, backend))
    torch.library.opcheck(ops.mask_row_counts, (words, backend))
    torch.library.opcheck(ops.mask_col_counts, (words, 70, backend))


def test_bad_input() -> None:
    words = packed((4, 70))
    with pytest.raises(TypeError, match="bool"):
        op.pack(torch.zeros(3, 3))
    with pytest.raises(TypeError, match="2-D uint8"):
        op.row_counts(words.int())
    with pytest.raises(ValueError, match="16 bytes; it must be 8 for 64 columns"):
        op.col_counts(words, 64)
    with pytest.raises(ValueError, match="at least one mask"):
        op.pair_counts([])
    with pytest.raises(ValueError, match="masks differ"):
        op.pair_counts([words, packed((5, 70))])
