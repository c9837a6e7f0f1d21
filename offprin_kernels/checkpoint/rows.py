"""How the rows of a stored tensor come to memory: from one range of a file, from chunks of several, from memory.

Everything that a checkpoint holds is read through one method, ``Rows.read``; a format only says where its bytes are.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .. import packing
from . import dtypes
from .storage import FileInfo, Files, Slab
from .torch_zip import row_major


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor. ``file`` indexes :attr:`Checkpoint.files`; ``offset`` is in bytes from that file's start.

    Of a tensor in several pieces they are those of its first rows, near which disks read on.
    """

    name: str
    dtype: str  # safetensors tag: "BF16", "F32", "F8_E4M3", ...
    shape: tuple[int, ...]
    nbytes: int
    file: int
    offset: int

    @property
    def rows(self) -> int:
        return packing.matrix_shape(self.shape)[0]

    @property
    def columns(self) -> int:
        return packing.matrix_shape(self.shape)[1]


class Rows(Protocol):
    """Reads rows of one tensor."""

    def read(self, files: Files, info: TensorInfo, start: int, stop: int, slab: Slab | None) -> torch.Tensor:
        """Rows [start, stop) of the matrix view, 2-D, contiguous, in the stored dtype; the range is inside the tensor.

        Raises CheckpointError: a file that changed or cannot be read.
        """
        ...


class Contents(NamedTuple):
    """What opening a format found: every tensor with its rows, and what :class:`Checkpoint` tells about the rest."""

    files: tuple[FileInfo, ...]
    tensors: list[tuple[TensorInfo, Rows]]
    ignored: list[str]
    notes: list[str]
    aliases: dict[str, str]
    config: dict[str, object] | None = None  # of the base of an adapter


class Span:
    """Rows that lie one behind the other in one file."""

    def read(self, files: Files, info: TensorInfo, start: int, stop: int, slab: Slab | None) -> torch.Tensor:
        item = dtypes.BITS[info.dtype] // 8
        begin = info.offset + start * info.columns * item
        data = files.read(info.file, begin, (stop - start) * info.columns * item, info.name, item, slab)
        return data.view(dtypes.TORCH[info.dtype]).view(stop - start, info.columns)


class Resident:
    """A tensor that has no range in a file and is held in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def read(self, files: Files, info: TensorInfo, start: int, stop: int, slab: Slab | None) -> torch.Tensor:
        return self.tensor.reshape(info.rows, info.columns)[start:stop].contiguous()


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


class _Block(NamedTuple):
    """Rows of a chunk that are neighbours in the tensor too; ``first`` is the first of them within the chunk."""

    row: int
    rows: int
    column: int
    columns: int
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
        full = [chunk for chunk in chunks if 0 not in chunk.sizes]
        self.blocks = sorted((block for chunk in full for block in _blocks(shape, chunk)), key=lambda block: block[:3])
        _check_tiles(*packing.matrix_shape(shape), self.blocks)

    def read(self, files: Files, info: TensorInfo, start: int, stop: int, slab: Slab | None) -> torch.Tensor:
        dtype, columns = dtypes.TORCH[info.dtype], info.columns
        if start == stop or not columns:
            return torch.empty(stop - start, columns, dtype=dtype)
        blocks = [block for block in self.blocks if block.row < stop and block.row + block.rows > start]
        if len(blocks) == 1:
            return _read_block(files, info, blocks[0], start, stop, slab)
        nbytes = (stop - start) * columns * dtypes.BITS[info.dtype] // 8
        memory = torch.empty(nbytes, dtype=torch.uint8) if slab is None else slab.take(nbytes)
        out = memory.view(dtype).view(stop - start, columns)
        for block in blocks:
            low, high = max(start, block.row), min(stop, block.row + block.rows)
            target = out[low - start : high - start, block.column : block.column + block.columns]
            _fill_block(files, info, block, low, high, target)
        return out


def _blocks(shape: tuple[int, ...], chunk: Chunk) -> list[_Block]:
    """A chunk as rectangles of the matrix view: one, unless it is a part in a dimension between the first and last."""
    if len(shape) < 2:
        column, columns = (chunk.offsets[0], chunk.sizes[0]) if shape else (0, 1)
        return [_Block(0, 1, column, columns, 0, chunk)]
    leading, offsets, sizes = shape[:-1], chunk.offsets[:-1], chunk.sizes[:-1]
    # Behind this dimension the chunk is whole, so that its rows follow each other there.
    split = len(leading) - 1
    while split > 0 and sizes[split] == leading[split]:
        split -= 1
    inner = math.prod(leading[split + 1 :])
    rows = sizes[split] * inner
    found = []
    for count, outer in enumerate(itertools.product(*(range(size) for size in sizes[:split]))):
        row = 0
        for position, index in enumerate(outer):
            row = row * leading[position] + offsets[position] + index
        row = (row * leading[split] + offsets[split]) * inner
        found.append(_Block(row, rows, chunk.offsets[-1], chunk.sizes[-1], count * rows, chunk))
    return found


def _check_tiles(rows: int, columns: int, blocks: Sequence[_Block]) -> None:
    """Raises ValueError unless the blocks cover every element exactly once."""
    if not rows or not columns:
        return
    edges = sorted({0, rows, *(block.row for block in blocks), *(block.row + block.rows for block in blocks)})
    number = {edge: index for index, edge in enumerate(edges)}
    strips: dict[int, list[_Block]] = defaultdict(list)
    for block in blocks:
        for strip in range(number[block.row], number[block.row + block.rows]):
            strips[strip].append(block)
    for strip, row in enumerate(edges[:-1]):
        column = 0
        for block in sorted(strips[strip], key=lambda block: block.column):
            if block.column != column:
                what = "stored twice" if block.column < column else "missing"
                raise ValueError(f"row {row} is {what} from column {min(column, block.column)} on")
            column += block.columns
        if column != columns:
            raise ValueError(f"row {row} is missing from column {column} on")


def _place(chunk: Chunk) -> tuple[Place, bool]:
    """The place of a chunk, and whether its elements lie in order there."""
    place = chunk.place()
    return place, place.strides == row_major(chunk.sizes, place.strides)


def _read_block(
    files: Files, info: TensorInfo, block: _Block, start: int, stop: int, slab: Slab | None
) -> torch.Tensor:
    """Rows of one block, which then has all columns or is read with the others into one tensor."""
    dtype, item = dtypes.TORCH[info.dtype], dtypes.BITS[info.dtype] // 8
    place, straight = _place(block.chunk)
    sizes, first = block.chunk.sizes, block.first + start - block.row
    if straight:
        begin = place.offset + first * block.columns * item
        data = files.read(block.chunk.file, begin, (stop - start) * block.columns * item, info.name, item, slab)
        return data.view(dtype).view(stop - start, block.columns)
    # Transposed and the like: the chunk is mapped (or read) as it lies, and the rows are picked from it.
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, place.strides, strict=True))
    data = files.read(block.chunk.file, place.offset, span * item, info.name, item)
    whole = torch.as_strided(data.view(dtype), sizes, place.strides)
    return whole.reshape(-1, block.columns)[first : first + stop - start].contiguous()


def _fill_block(files: Files, info: TensorInfo, block: _Block, start: int, stop: int, target: torch.Tensor) -> None:
    """Rows of one block into their part of the result."""
    item = dtypes.BITS[info.dtype] // 8
    place, straight = _place(block.chunk)
    if straight and target.is_contiguous():
        begin = place.offset + (block.first + start - block.row) * block.columns * item
        files.read_into(block.chunk.file, begin, target.view(-1).view(torch.uint8), info.name)
    else:
        target.copy_(_read_block(files, info, block, start, stop, None))
