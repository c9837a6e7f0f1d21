"""What became of every tensor of both checkpoints."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

import torch

from . import dtypes, fp8
from .reader import Checkpoint
from .storage import Slab


class Status(str, enum.Enum):
    """What became of one stored tensor."""

    COMPARED = "compared"
    CAST = "cast"  # compared; a side that was not bf16 is rounded to bf16 first
    PARTIAL = "partial"  # compared in the rows that both sides have
    TIED = "tied"  # counted once, under another name
    SCALE = "scale"  # multiplied into the fp8 weight that it belongs to
    NOT_WEIGHT = "not_weight"  # a buffer or an activation scale: nothing that training moves
    EXCLUDED = "excluded"  # by an include or exclude glob
    UNMATCHED = "unmatched"  # no counterpart on the other side
    REFUSED = "refused"  # cannot be compared, for the reason given

    def __str__(self) -> str:
        return self.value


COMPARED = frozenset({Status.COMPARED, Status.CAST, Status.PARTIAL})
INCOMPLETE = frozenset({Status.UNMATCHED, Status.REFUSED})


@dataclass(frozen=True)
class TensorRef:
    """Rows [start_row, start_row + rows) of a stored tensor's matrix view; :meth:`read` counts rows from there."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # of the whole stored tensor
    start_row: int
    rows: int
    columns: int
    scale: fp8.ScaleRef | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype of what :meth:`read` returns: fp32 for fp8 with its scale, else the stored one."""
        return torch.float32 if self.scale else dtypes.TORCH[self.dtype]

    @property
    def stored_row_bytes(self) -> int:
        """Bytes that one row takes in the file."""
        return self.columns * dtypes.BITS[self.dtype] // 8

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes in memory at the peak of :meth:`read`."""
        return self.stored_row_bytes + (4 * self.columns if self.scale else 0)

    def read(
        self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None, *, slab: Slab | None = None
    ) -> torch.Tensor:
        """Rows [start, stop) of this range, 2-D, bf16, fp16 or fp32; fp8 comes dequantized. Not to be written to.

        Raises:
            CheckpointError: see :meth:`Checkpoint.read`.
            IndexError: rows outside the range.
        """
        end = self.rows if stop is None else stop
        if not 0 <= start <= end <= self.rows:
            raise IndexError(f"rows {start} to {end} of {self.name}, of which {self.rows} are meant here")
        first = self.start_row + start
        stored = checkpoint.read(self.name, first, self.start_row + end, slab=slab)
        return fp8.dequantize(checkpoint, stored, self.scale, first) if self.scale else stored


@dataclass(frozen=True)
class TensorPair:
    """Two row ranges to compare, of equal size. ``name`` is the base's, per expert where it stores them fused."""

    name: str
    base: TensorRef
    tuned: TensorRef
    status: Status
    note: str = ""


@dataclass(frozen=True)
class LedgerEntry:
    """One stored tensor of one side."""

    side: str  # "base" or "tuned"
    name: str
    status: Status
    partner: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Pairing:
    """All pairs, in the order in which the base lies on disk, and the ledger: one entry per stored tensor and side."""

    pairs: tuple[TensorPair, ...]
    ledger: tuple[LedgerEntry, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of stored tensors by side and status; statuses that do not occur are left out."""
        counted = Counter((entry.side, entry.status) for entry in self.ledger)
        return {
            side: {status.value: counted[side, status] for status in Status if counted[side, status]}
            for side in ("base", "tuned")
        }

    @property
    def complete(self) -> bool:
        """Whether no tensor is unmatched or refused."""
        return not any(entry.status in INCOMPLETE for entry in self.ledger)
