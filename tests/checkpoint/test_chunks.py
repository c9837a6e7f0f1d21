"""Chunks of any place and any order of dimensions, against the whole; what does not tile; memory."""

from __future__ import annotations

import functools
import math
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from offprin_kernels.checkpoint import CheckpointError, Slab
from offprin_kernels.checkpoint import chunks as reading
from offprin_kernels.checkpoint.chunks import Chunk, Chunked, Place
from offprin_kernels.checkpoint.rows import TensorInfo
from offprin_kernels.checkpoint.storage import Files, file_info

from .workers import save_ranks


def at(place: Place) -> Place:
    return place


def boxes(shape: tuple[int, ...], dice: random.Random) -> list[tuple[list[int], list[int]]]:
    """A tensor cut into (offsets, sizes), by one cut through one of the pieces after the other."""
    found = [([0] * len(shape), list(shape))]
    for _ in range(dice.randint(0, 6)):
        offsets, sizes = found.pop(dice.randrange(len(found)))
        axis = dice.randrange(len(shape))
        cut = dice.randint(0, sizes[axis])
        low, high = sizes.copy(), sizes.copy()
        low[axis], high[axis] = cut, sizes[axis] - cut
        behind = offsets.copy()
        behind[axis] += cut
        found += [(offsets, low), (behind, high)]
    return found


@pytest.mark.parametrize("piece", [reading.PIECE, 16])
@pytest.mark.parametrize("seed", range(40))
def test_boxes_that_lie_in_any_order(tmp_path: Path, seed: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", piece)
    dice = random.Random(seed)
    shape = tuple(dice.randint(1, 6) for _ in range(dice.randint(1, 4)))
    whole = torch.arange(math.prod(shape)).view(shape).float()
    content, chunks = b"", []
    for offsets, sizes in boxes(shape, dice):
        part = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
        order = dice.sample(range(len(shape)), len(shape))
        stored = part.permute(order).contiguous()
        strides = stored.permute([order.index(axis) for axis in range(len(shape))]).stride()
        place = Place(len(content), strides)
        chunks.append(Chunk(0, tuple(offsets), tuple(sizes), functools.partial(at, place)))
        content += stored.numpy().tobytes()
    (tmp_path / "data").write_bytes(content)
    info, slab = TensorInfo("w", "F32", shape, whole.nbytes, 0, 0), Slab()
    rows, matrix = Chunked(shape, chunks), whole.reshape(-1, shape[-1])
    for io in ("mmap", "read"):
        files = Files((file_info(tmp_path / "data", "dcp"),), io)
        for start in range(info.rows + 1):
            for stop in {start, dice.randint(start, info.rows), info.rows}:
                assert torch.equal(rows.read(files, info, start, stop, slab), matrix[start:stop])


def made(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> list[Chunk]:
    return [Chunk(0, offsets, sizes, functools.partial(at, Place(0, ()))) for offsets, sizes in boxes]


@pytest.mark.parametrize(
    ("shape", "parts", "expected"),
    [
        ((), [], "row 0 is missing from column 0 on"),
        ((3,), [((0,), (2,))], "row 0 is missing from column 2 on"),
        ((4, 3), [((0, 0), (4, 2))], "row 0 is missing from column 2 on"),
        ((4, 3), [((0, 0), (4, 2)), ((1, 2), (3, 1))], "row 0 is missing from column 2 on"),
        ((4, 3), [((0, 0), (4, 3)), ((2, 1), (1, 1))], "row 2 is stored twice from column 1 on"),
        ((2, 4, 3), [((0, 0, 0), (2, 2, 3)), ((0, 2, 0), (1, 2, 3))], "row 6 is missing from column 0 on"),
        ((2, 4, 3), [((0, 0, 0), (2, 3, 3)), ((0, 2, 0), (2, 2, 3))], "row 2 is stored twice from column 0 on"),
        ((2, 4, 3), [((0, 0, 0), (2, 4))], r"a chunk of shape \[2, 4\] at \[0, 0, 0\]"),
        ((2, 4), [((0, 1), (2, 4))], "reaches beyond it"),
    ],
)
def test_chunks_that_do_not_tile(shape: tuple[int, ...], parts: list, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        Chunked(shape, made(*parts))
    assert not isinstance(caught.value, CheckpointError)


def test_rows_of_a_middle_dimension_are_not_listed() -> None:
    """Two chunks of 2^33 runs each: nothing is made of them until rows are asked for."""
    tall = 1 << 33
    rows = Chunked((tall, 2, 1), made(((0, 0, 0), (tall, 1, 1)), ((0, 1, 0), (tall, 1, 1))))
    runs = list(reading._runs(rows.shape, rows.chunks[1][2], 2 * tall - 4, 2 * tall))
    assert [(run.row, run.rows, run.first) for run in runs] == [
        (2 * tall - 3, 1, tall - 2),
        (2 * tall - 1, 1, tall - 1),
    ]


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("layout", ["experts", "matrix"])
def test_memory_of_transposed_chunks_stays_small(tmp_path: Path, layout: str, io: str) -> None:
    whole = {
        "experts": torch.zeros(8, 2048, 1024, dtype=torch.float32).transpose(1, 2),
        "matrix": torch.zeros(1 << 12, 1 << 12).t(),
    }
    save_ranks({"w": whole[layout]}, 0, 1, tmp_path)  # 64 MiB
    save_ranks({"w": torch.zeros(8, 4).t()}, 0, 1, tmp_path / "small")
    script = """
        import resource, sys
        from offprin_kernels.checkpoint import Checkpoint, Slab
        Checkpoint.open(sys.argv[1] + "/small").read("w")
        checkpoint, slab = Checkpoint.open(sys.argv[1], io=sys.argv[2]), Slab()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for start in range(1000, 1256, 64):
            checkpoint.read("w", start, start + 64, slab=slab).sum()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), io]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 36 << 10, "KiB for slabs of 1 MiB"
