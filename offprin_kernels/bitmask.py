"""BitMask: a set of weight coordinates at one bit each, and its algebra."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .ops import mask_algebra
from .packing import matrix_shape, row_bytes

FORMAT = "offprin-bitmask-1"


class BitMask:
    """A boolean tensor of any shape, packed to one bit per element.

    The last dimension runs along packed rows; leading dimensions are flattened into rows (a vector is one row).
    Storage is ``words``: ``uint8 [rows, 8 * ceil(columns / 64)]``, little-endian bits, padding bits zero, so that
    ``numpy.unpackbits(words, axis=1, bitorder="little")[:, :columns]`` reads it.
    """

    __slots__ = ("shape", "words")

    def __init__(self, words: torch.Tensor, shape: Sequence[int], *, check: bool = True) -> None:
        """Wrap packed words (no copy).

        Args:
            words: uint8 ``[rows, row_bytes(columns)]`` on any device.
            shape: shape of the boolean tensor that is represented.
            check: verify that the padding bits are zero (one pass over the last 8 bytes of each row).

        Raises:
            TypeError: words that are not 2-D uint8.
            ValueError: words that do not fit the shape, or set padding bits.
        """
        self.shape = torch.Size(shape)
        rows, columns = matrix_shape(self.shape)
        mask_algebra.check(words, columns)
        if words.shape[0] != rows:
            raise ValueError(f"packed words have {words.shape[0]} rows, but shape {tuple(shape)} has {rows}")
        if check and columns % 64 and rows:
            last = words[:, -8:].contiguous()
            if bool((last & ~tail_bytes(columns, words.device)).any()):
                raise ValueError(f"packed words set padding bits behind column {columns}; pack with BitMask.from_dense")
        self.words = words

    @classmethod
    def from_dense(cls, dense: torch.Tensor, *, backend: str | None = None) -> BitMask:
        """Pack a bool tensor of any shape. Raises TypeError for any other dtype."""
        if not isinstance(dense, torch.Tensor):
            raise TypeError(f"BitMask.from_dense needs a bool tensor, got {type(dense).__name__}; use torch.from_numpy")
        if dense.dtype != torch.bool:
            raise TypeError(f"BitMask.from_dense needs a bool tensor, got {dense.dtype}; compare with != 0 first")
        matrix = dense.reshape(matrix_shape(dense.shape))
        return cls(mask_algebra.pack(matrix, backend=backend), dense.shape, check=False)

    @classmethod
    def zeros(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> BitMask:
        """The empty set."""
        rows, columns = matrix_shape(shape)
        return cls(torch.zeros((rows, row_bytes(columns)), dtype=torch.uint8, device=device), shape, check=False)

    @classmethod
    def ones(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> BitMask:
        """Every coordinate."""
        return ~cls.zeros(shape, device)

    @classmethod
    def cat(cls, shards: Sequence[BitMask]) -> BitMask:
        """Join row shards (as made by slicing) into one 2-D mask. Raises ValueError where columns differ."""
        if not shards:
            raise ValueError("BitMask.cat needs at least one shard")
        columns = {matrix_shape(shard.shape)[1] for shard in shards}
        if len(columns) > 1:
            raise ValueError(f"shards have different numbers of columns: {sorted(columns)}")
        words = torch.cat([shard.words for shard in shards])
        return cls(words, (words.shape[0], columns.pop()), check=False)

    # ---- size and place

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def columns(self) -> int:
        return matrix_shape(self.shape)[1]

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self.words.numel()

    def numel(self) -> int:
        """Coordinates, set or not."""
        return self.shape.numel()

    def to(self, device: torch.device | str) -> BitMask:
        return BitMask(self.words.to(device), self.shape, check=False)

    def clone(self) -> BitMask:
        return BitMask(self.words.clone(), self.shape, check=False)

    def to_dense(self, *, backend: str | None = None) -> torch.Tensor:
        """bool tensor of the mask's shape: eight times the memory."""
        return mask_algebra.unpack(self.words, self.columns, backend=backend).reshape(self.shape)

    def __getitem__(self, rows: slice) -> BitMask:
        """A shard of consecutive rows, sharing storage: ``mask[a:b]``, a 2-D mask."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError("a BitMask is sliced by consecutive rows, as in mask[a:b]")
        words = self.words[rows]
        return BitMask(words, (words.shape[0], self.columns), check=False)

    # ---- set algebra

    def __and__(self, other: BitMask) -> BitMask:
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: BitMask) -> BitMask:
        return self._combine(other, torch.bitwise_or)

    def __xor__(self, other: BitMask) -> BitMask:
        return self._combine(other, torch.bitwise_xor)

    def __sub__(self, other: BitMask) -> BitMask:
        """Coordinates of self that are not in other."""
        return self._combine(other, lambda a, b: a.bitwise_and(b.bitwise_not()))

    def __invert__(self) -> BitMask:
        """Complement; padding bits stay zero."""
        words = self.words.bitwise_not()
        if self.columns % 64 and self.rows:
            words[:, -8:] &= tail_bytes(self.columns, words.device)
        return BitMask(words, self.shape, check=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.words, other.words.to(self.device))

    __hash__ = None  # type: ignore[assignment]  # mutable storage

    def _combine(self, other: BitMask, operator) -> BitMask:
        if not isinstance(other, BitMask):
            return NotImplemented
        self._check_alike(other)
        words = operator(as_int64(self.words), as_int64(other.words)).view(torch.uint8)
        return BitMask(words.view(self.words.shape), self.shape, check=False)

    def _check_alike(self, other: BitMask) -> None:
        if self.shape != other.shape:
            raise ValueError(f"masks have different shapes: {tuple(self.shape)} and {tuple(other.shape)}")
        if self.device != other.device:
            raise ValueError(f"masks lie on {self.device} and {other.device}; move one with .to()")

    # ---- counting (exact)

    def count(self, *, backend: str | None = None) -> int:
        """Number of coordinates in the set."""
        return int(mask_algebra.pair_counts([self.words], backend=backend)[0, 0])

    @property
    def density(self) -> float:
        """count / numel; 0 for an empty shape."""
        return self.count() / self.numel() if self.numel() else 0.0

    def row_counts(self, *, backend: str | None = None) -> torch.Tensor:
        """Set coordinates per row, int64 ``[rows]``."""
        return mask_algebra.row_counts(self.words, backend=backend)

    def col_counts(self, *, backend: str | None = None) -> torch.Tensor:
        """Set coordinates per column, int64 ``[columns]``."""
        return mask_algebra.col_counts(self.words, self.columns, backend=backend)

    def jaccard(self, other: BitMask) -> float:
        """|A & B| / |A | B|; 1 where both are empty. Source: arXiv 2511.08567, section 2.2."""
        self._check_alike(other)
        counts = mask_algebra.pair_counts([self.words, other.words])
        intersection = int(counts[0, 1])
        union = int(counts[0, 0]) + int(counts[1, 1]) - intersection
        return intersection / union if union else 1.0

    def overlap(self, other: BitMask) -> float:
        """|A & B| / |B|: the share of ``other`` that lies in self; NaN where other is empty.

        The baseline is ``self.density``. Source: arXiv 2511.08567, section 4.2 (A a weight mask, B an update mask).
        """
        self._check_alike(other)
        counts = mask_algebra.pair_counts([self.words, other.words])
        total = int(counts[1, 1])
        return int(counts[0, 1]) / total if total else float("nan")

    # ---- storage

    @staticmethod
    def save(masks: Mapping[str, BitMask], path: str | Path) -> None:
        """Write named masks to one safetensors file, shapes in its metadata; atomic (temporary file, then rename)."""
        from safetensors.torch import save_file

        path = Path(path)
        shapes = {name: list(mask.shape) for name, mask in masks.items()}
        tensors: dict[str, torch.Tensor] = {}
        storages = set()
        for name, mask in masks.items():
            words = mask.words.cpu().contiguous()
            storage = words.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory, as slices of one mask do
            tensors[name] = words.clone() if storage in storages else words
            storages.add(storage)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata={"format": FORMAT, "shapes": json.dumps(shapes)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path, names: Iterable[str] | None = None, device: str = "cpu") -> dict[str, BitMask]:
        """Read masks written by :meth:`save`, all or those named.

        Raises ValueError for a file without mask metadata and KeyError for names it does not hold, all listed.
        """
        from safetensors import safe_open

        with safe_open(str(path), framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} holds no masks (its metadata lacks format={FORMAT}); write it with BitMask.save"
                )
            shapes = json.loads(metadata["shapes"])
            wanted = list(shapes) if names is None else list(names)
            missing = [name for name in wanted if name not in shapes]
            if missing:
                raise KeyError(f"{path} holds no mask for {', '.join(missing)}")
            return {name: BitMask(file.get_tensor(name), shapes[name]) for name in wanted}

    def __repr__(self) -> str:
        return f"BitMask(shape={tuple(self.shape)}, device={self.device}, {self.nbytes} bytes)"


def as_int64(words: torch.Tensor) -> torch.Tensor:
    """Packed rows as flat 64-bit words (8-byte aligned copy where the storage offset is odd)."""
    flat = words.contiguous().view(-1)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def tail_bytes(columns: int, device: torch.device) -> torch.Tensor:
    """uint8 ``[8]``: ones where the last 8 bytes of a packed row hold real columns."""
    used = columns % 64
    word = (1 << used) - 1 if used else (1 << 64) - 1
    return torch.tensor(list(word.to_bytes(8, "little")), dtype=torch.uint8, device=device)
