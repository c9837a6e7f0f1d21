"""BitMask: a boolean tensor in every respect but its size."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offprin_kernels import BitMask

ANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.lists(st.integers(0, 70), min_size=0, max_size=3).map(tuple)


def bits(shape, seed: int = 0, density: float = 0.4) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@ANY
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_algebra_is_that_of_bool_tensors(shape, seed) -> None:
    a, b = bits(shape, seed), bits(shape, seed + 1)
    x, y = BitMask.from_dense(a), BitMask.from_dense(b)
    assert x.shape == a.shape and x.numel() == a.numel()
    for got, want in ((x & y, a & b), (x | y, a | b), (x ^ y, a ^ b), (x - y, a & ~b), (~x, ~a)):
        assert torch.equal(got.to_dense(), want)
        assert got.count() == int(want.sum())
    union, both = int((a | b).sum()), int((a & b).sum())
    assert x.jaccard(y) == (both / union if union else 1.0)
    if int(b.sum()):
        assert x.overlap(y) == both / int(b.sum())
    assert x.density == (int(a.sum()) / a.numel() if a.numel() else 0.0)


def test_numpy_reads_the_words() -> None:
    dense = bits((5, 77))
    words = BitMask.from_dense(dense).words.numpy()
    np.testing.assert_array_equal(np.unpackbits(words, axis=1, bitorder="little")[:, :77].astype(bool), dense.numpy())


def test_one_bit_per_weight() -> None:
    assert BitMask.zeros((4096, 14336)).nbytes * 8 == 4096 * 14336


def test_zeros_and_ones() -> None:
    assert BitMask.zeros((3, 70)).count() == 0
    assert BitMask.ones((3, 70)).count() == 210
    assert (~BitMask.ones((3, 70))) == BitMask.zeros((3, 70))


def test_counts_by_row_and_column() -> None:
    dense = bits((2, 3, 70))
    mask = BitMask.from_dense(dense)
    assert mask.row_counts().tolist() == dense.view(6, 70).sum(1).tolist()
    assert mask.col_counts().tolist() == dense.view(6, 70).sum(0).tolist()


def test_slices_share_storage_and_join_again() -> None:
    mask = BitMask.from_dense(bits((10, 70)))
    shards = [mask[:4], mask[4:4], mask[4:]]
    assert shards[0].words.data_ptr() == mask.words.data_ptr()
    assert BitMask.cat(shards) == mask
    with pytest.raises(TypeError, match="consecutive rows"):
        mask[::2]
    with pytest.raises(ValueError, match="numbers of columns"):
        BitMask.cat([mask, BitMask.zeros((1, 3))])


def test_jaccard_of_empty_masks_is_one_and_overlap_undefined() -> None:
    empty = BitMask.zeros((3, 5))
    assert empty.jaccard(empty) == 1.0
    assert np.isnan(BitMask.ones((3, 5)).overlap(empty))


def test_save_and_load(tmp_path) -> None:
    masks = {
        "a.weight": BitMask.from_dense(bits((5, 70))),
        "b": BitMask.from_dense(bits((3,))),
        "c": BitMask.zeros((0, 4)),
    }
    path = tmp_path / "masks.safetensors"
    BitMask.save(masks, path)
    loaded = BitMask.load(path)
    assert loaded == masks
    assert list(BitMask.load(path, ["b"])) == ["b"]
    with pytest.raises(KeyError, match="no mask for d, e"):
        BitMask.load(path, ["a.weight", "d", "e"])
    assert [file.name for file in tmp_path.iterdir()] == ["masks.safetensors"]


def test_save_masks_that_share_storage(tmp_path) -> None:
    mask = BitMask.from_dense(bits((10, 70)))
    masks = {"whole": mask, "again": mask, "top": mask[:4], "rest": mask[4:], "none": mask[4:4]}
    BitMask.save(masks, tmp_path / "masks.safetensors")
    assert BitMask.load(tmp_path / "masks.safetensors") == masks


def test_load_refuses_other_files(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no masks"):
        BitMask.load(tmp_path / "weights.safetensors")


def test_pickle_and_deepcopy() -> None:
    mask = BitMask.from_dense(bits((5, 70)))
    assert pickle.loads(pickle.dumps(mask)) == mask
    twin = copy.deepcopy(mask)
    twin.words.zero_()
    assert twin != mask


def test_odd_storage_offsets() -> None:
    raw = torch.zeros(8 * 16 + 3, dtype=torch.uint8)
    mask = BitMask(raw[3:].view(8, 16), (8, 70))
    assert (mask | BitMask.ones((8, 70))).count() == 560


@pytest.mark.parametrize(
    ("words", "shape", "error", "text"),
    [
        (torch.zeros(2, 8, dtype=torch.uint8), (3, 5), ValueError, "2 rows, but shape"),
        (torch.zeros(2, 8, dtype=torch.uint8), (2, 65), ValueError, "8 bytes; it must be 16"),
        (torch.zeros(2, 8), (2, 5), TypeError, "2-D uint8"),
        (torch.full((2, 8), 255, dtype=torch.uint8), (2, 5), ValueError, "padding bits"),
    ],
)
def test_bad_words(words, shape, error, text) -> None:
    with pytest.raises(error, match=text):
        BitMask(words, shape)


def test_bad_partners() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        BitMask.zeros((2, 3)) & BitMask.zeros((3, 2))
    with pytest.raises(TypeError, match="needs a bool tensor"):
        BitMask.from_dense(torch.zeros(3))
    with pytest.raises(TypeError, match=r"use torch\.from_numpy"):
        BitMask.from_dense(np.zeros(3, dtype=bool))
