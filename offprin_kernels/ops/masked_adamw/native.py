"""``masked_adamw`` in the compiled CPU library: pointer marshalling, nothing else."""

from __future__ import annotations

import torch

from ..._backend import threads
from ..._native import library
from ...packing import empty
from . import contract as c


def step(tables: c.Tables, track: bool) -> torch.Tensor | None:
    counts = empty((len(tables.slots),), torch.int64, tables.device) if track else None
    kind = tables.kind
    library("cpu").masked_adamw(
        tables.slots.data_ptr(), tables.hypers.data_ptr(), tables.cohorts.data_ptr(), len(tables.slots),
        c.DTYPE_CODES[kind.param], c.DTYPE_CODES[kind.state], int(kind.rounding),
        0 if counts is None else counts.data_ptr(), threads(),
    )  # fmt: skip
    return counts
