"""Tensors in chunks, which may be boxes of any place and may lie transposed in their files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import dtypes
from .rows import TensorInfo
from .storage import Files, Slab
from .torch_zip import row_major

PIECE = 16 << 20  # bytes of a transposed chunk that are looked at together


class Place(NamedTuple):
    """Where the first element of a chunk lies in its file, in bytes, and the strides of the chunk, in elements."""

    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: ``sizes`` elements from ``offsets`` on. ``place`` may open the file to find it."""

    file: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Callable[[], Place]


class _Run(NamedTuple):
    """Rows [row, row + rows) of the tensor, which follow each other in a chunk from its row ``first`` on."""

    row: int
    rows: int
    first: int
    chunk: Chunk


class Chunked:
    """A tensor in chunks, of one or several files.

    Args:
        shape: of the tensor.
        chunks: in any order; those without elements are left out.

    Raises:
        ValueError: the chunks do not cover the tensor exactly once; the message says what is wrong.
    """

    def __init__(self, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if len(chunk.sizes) != len(shape) or len(chunk.offsets) != len(shape):
                raise ValueError(f"a chunk of shape {list(chunk.sizes)} at {list(chunk.offsets)}")
            if any(at + size > end for at, size, end in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
                raise ValueError(f"a chunk of shape {list(chunk.sizes)} at {list(chunk.offsets)} reaches beyond it")
        self.shape = shape
        full = sorted((chunk for chunk in chunks if 0 not in chunk.sizes), key=lambda chunk: chunk.offsets)
        if 0 not in shape:
            _check_tiles(shape, 0, 0, full)
        # With the first of its rows and the one behind its last.
        self.chunks = [(*_reach(shape, chunk), chunk) for chunk in full]

    def read(self, files: Files, info: TensorInfo, start: int, stop: int, slab: Slab | None) -> torch.Tensor:
        dtype, columns = dtypes.TORCH[info.dtype], info.columns
        if start == stop or not columns:
            return torch.empty(stop - start, columns, dtype=dtype)
        near = [chunk for low, high, chunk in self.chunks if low < stop and high > start]
        runs = (run for chunk in near for run in _runs(self.shape, chunk, start, stop))
        first = next(runs)
        if first.rows == stop - start and _columns(first.chunk) == (0, columns):
            place, straight = _place(first.chunk)
            if straight:
                return _read_straight(files, info, first, place, slab)
        nbytes = (stop - start) * columns * dtypes.BITS[info.dtype] // 8
        memory = torch.empty(nbytes, dtype=torch.uint8) if slab is None else slab.take(nbytes)
        out = memory.view(dtype).view(stop - start, columns)
        for run in itertools.chain((first,), runs):
            column, width = _columns(run.chunk)
            low = run.row - start
            _fill(files, info, run, out[low : low + run.rows, column : column + width])
        return out


def _reach(shape: tuple[int, ...], chunk: Chunk) -> tuple[int, int]:
    low = high = 0
    for end, at, size in zip(shape[:-1], chunk.offsets[:-1], chunk.sizes[:-1], strict=True):
        low, high = low * end + at, high * end + at + size - 1
    return low, high + 1


def _columns(chunk: Chunk) -> tuple[int, int]:
    """(first, count) of a chunk's columns."""
    return (chunk.offsets[-1], chunk.sizes[-1]) if chunk.sizes else (0, 1)


def _runs(shape: tuple[int, ...], chunk: Chunk, start: int, stop: int) -> Iterator[_Run]:
    """The rows of a chunk that lie in [start, stop): in one run, unless it is a part in a middle dimension."""
    if len(shape) < 2:
        yield _Run(0, 1, 0, chunk)
        return
    leading, offsets, sizes = shape[:-1], chunk.offsets[:-1], chunk.sizes[:-1]
    # Behind this dimension the chunk is whole, so that its rows follow each other there.
    split = len(leading) - 1
    while split > 0 and sizes[split] == leading[split]:
        split -= 1
    inner = math.prod(leading[split + 1 :])
    rows = sizes[split] * inner
    for outer in range(start // (leading[split] * inner), (stop - 1) // (leading[split] * inner) + 1):
        # The run of this index, whose number within the chunk is counted in the chunk's own sizes.
        number, left, unit = 0, outer, 1
        for end, at, size in zip(
            reversed(leading[:split]), reversed(offsets[:split]), reversed(sizes[:split]), strict=True
        ):
            left, index = divmod(left, end)
            if not at <= index < at + size:
                break
            number += (index - at) * unit
            unit *= size
        else:
            row = (outer * leading[split] + offsets[split]) * inner
            low, high = max(start, row), min(stop, row + rows)
            if low < high:
                yield _Run(low, high - low, number * rows + low - row, chunk)


def _check_tiles(shape: tuple[int, ...], axis: int, row: int, chunks: Sequence[Chunk]) -> None:
    """Raises ValueError unless the chunks cover every element from this axis on exactly once."""
    if axis >= len(shape) - 1:
        column = 0
        for at, count in sorted(map(_columns, chunks)):
            if at != column:
                what = "stored twice" if at < column else "missing"
                raise ValueError(f"row {row} is {what} from column {min(column, at)} on")
            column += count
        if column != (shape[-1] if shape else 1):
            raise ValueError(f"row {row} is missing from column {column} on")
        return
    edges = {0, shape[axis]}
    for chunk in chunks:
        edges |= {chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]}
    waiting = sorted(chunks, key=lambda chunk: chunk.offsets[axis], reverse=True)
    inner = math.prod(shape[axis + 1 : -1])
    here: list[Chunk] = []
    for edge in sorted(edges)[:-1]:
        here = [chunk for chunk in here if chunk.offsets[axis] + chunk.sizes[axis] > edge]
        while waiting and waiting[-1].offsets[axis] == edge:
            here.append(waiting.pop())
        _check_tiles(shape, axis + 1, row + edge * inner, here)


def _place(chunk: Chunk) -> tuple[Place, bool]:
    """The place of a chunk, and whether its elements lie in order there."""
    place = chunk.place()
    return place, place.strides == row_major(chunk.sizes, place.strides)


def _read_straight(files: Files, info: TensorInfo, run: _Run, place: Place, slab: Slab | None) -> torch.Tensor:
    """A run of a chunk whose elements lie in order: one range of its file."""
    width, item = _columns(run.chunk)[1], dtypes.BITS[info.dtype] // 8
    begin = place.offset + run.first * width * item
    data = files.read(run.chunk.file, begin, run.rows * width * item, info.name, item, slab)
    return data.view(dtypes.TORCH[info.dtype]).view(run.rows, width)


def _fill(files: Files, info: TensorInfo, run: _Run, target: torch.Tensor) -> None:
    """A run into its part of the result."""
    item = dtypes.BITS[info.dtype] // 8
    place, straight = _place(run.chunk)
    if straight and target.is_contiguous():
        begin = place.offset + run.first * target.shape[1] * item
        files.read_into(run.chunk.file, begin, target.view(-1).view(torch.uint8), info.name)
    elif straight:
        target.copy_(_read_straight(files, info, run, place, None))
    else:
        done = 0
        for offset, sizes, strides in _boxes(run.chunk.sizes or (1,), place.strides or (1,), run.first, run.rows):
            rows = math.prod(sizes[:-1])
            view = target[done : done + rows].view(sizes)
            _copy(files, info, run.chunk.file, place.offset + offset * item, strides, view)
            done += rows


def _copy(
    files: Files, info: TensorInfo, file: int, begin: int, strides: tuple[int, ...], target: torch.Tensor
) -> None:
    """A box that is transposed or the like: mapped or read as it lies, from its first element to its last."""
    item, reach = target.element_size(), [(size - 1) * step for size, step in zip(target.shape, strides, strict=True)]
    span = 1 + sum(reach)
    if span * item <= PIECE:
        data = files.read(file, begin, span * item, info.name, item).view(target.dtype)
        target.copy_(torch.as_strided(data, target.shape, strides))
        return
    # Too far apart to be taken together: one half after the other of the dimension that reaches farthest.
    axis = reach.index(max(reach))
    half = target.shape[axis] // 2
    for low, count in ((0, half), (half, target.shape[axis] - half)):
        _copy(files, info, file, begin + low * strides[axis] * item, strides, target.narrow(axis, low, count))


def _boxes(
    sizes: tuple[int, ...], strides: tuple[int, ...], first: int, rows: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(offset, sizes, strides) of the boxes that make up rows of a chunk: as few as it takes, in the order of the rows.

    A box has one index in its first dimensions, a range in the next, and all that is behind.
    """
    if len(sizes) < 2 or not rows:
        yield from ((0, sizes, strides),) if rows else ()
        return
    inner = math.prod(sizes[1:-1])
    while rows:
        index, skip = divmod(first, inner)
        if skip or rows < inner:
            count = min(rows, inner - skip)
            for offset, within, steps in _boxes(sizes[1:], strides[1:], skip, count):
                yield index * strides[0] + offset, within, steps
        else:
            count = rows // inner * inner
            yield index * strides[0], (count // inner, *sizes[1:]), strides
        first, rows = first + count, rows - count
