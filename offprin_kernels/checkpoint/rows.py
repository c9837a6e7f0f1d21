"""How the rows of a stored tensor come to memory: from one range of a file, from chunks of several, from memory.

Everything that a checkpoint holds is read through one method, ``Rows.read``; a format only says where its bytes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .. import packing
from . import dtypes
from .storage import FileInfo, Files, Slab


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
