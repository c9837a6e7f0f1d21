"""What every backend of ``masked_adamw`` agrees on: the tables that describe a step, its roundings, its random numbers.

A launch steps many tensors of one combination of dtypes. It reads three tables:

* ``slots`` int64 ``[tensors, len(Slot)]``: addresses and sizes, a row per tensor;
* ``hypers`` fp32 ``[*, len(Hyper)]``: factors, a row per distinct setting, shared by tensors;
* ``cohorts`` fp32 ``[*, len(Cohort)]``: bias corrections, a row per distinct setting and number of steps taken.

Coordinates are flat indices of a contiguous tensor. State is compact: entry i of ``exp_avg`` belongs to the i-th
coordinate in the mask. A mask is packed flat, 64 coordinates to a word, little-endian bits, padded with zero bits to
whole blocks of ``BLOCK`` coordinates; ``prefix`` holds for every block how many set bits come before it, and behind
them the total.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch

from ...numerics import mixed, signed

BLOCK = 1024  # coordinates per entry of prefix, and per unit of work

DTYPE_CODES = {torch.bfloat16: 0, torch.float32: 2}  # of parameters and of moments


class Rounding(IntEnum):
    """How an fp32 result becomes a stored parameter. fp32 parameters know NEAREST only."""

    NEAREST = 0  # ties to even
    STOCHASTIC = 1  # up with probability of the discarded fraction; see ``stream``
    KAHAN = 2  # ties to even; what was lost is kept in bf16 and given back before the next step
    MASTER = 3  # ties away from zero; the low 16 bits are kept, so that weight and bits are the fp32 master


# dtype of what a rounding keeps beside the moments, one entry per masked coordinate
EXTRA = {Rounding.KAHAN: torch.bfloat16, Rounding.MASTER: torch.int16}


class Slot(IntEnum):
    """Columns of ``slots``. An address of 0 means: none."""

    PARAM = 0
    GRAD = 1
    EXP_AVG = 2
    EXP_AVG_SQ = 3
    EXTRA = 4  # of the rounding: see ``EXTRA``
    MASK = 5  # packed words; 0: every coordinate
    PREFIX = 6  # int64 [blocks + 1]; 0 where MASK is
    COHORT = 7  # uint8 per masked coordinate, added to FIRST_COHORT; 0: all in that one
    CHANGED = 8  # packed bits, one per masked coordinate (whole words), or-ed with the visible changes
    NUMEL = 9
    OFFSET = 10  # flat index, in the whole parameter, of the first coordinate of this shard of it
    STREAM = 11  # of the random numbers
    HYPER = 12  # row of hypers
    FIRST_COHORT = 13  # row of cohorts


class Hyper(IntEnum):
    """Columns of ``hypers``, each computed in double precision and rounded to fp32 once."""

    DECAY = 0  # 1 - lr * weight_decay
    LERP = 1  # 1 - beta1; less 1 (in fp32) where that is 0.5 or more
    NEAR_GRAD = 2  # 1 there: the first moment is interpolated from the gradient's end; else 0
    BETA2 = 3
    SQUARE = 4  # 1 - beta2
    EPS = 5
    SIGN = 6  # -1 to maximize, else 1
    SCALE = 7  # gradients are divided by this


class Cohort(IntEnum):
    """Columns of ``cohorts``."""

    STEP_SIZE = 0  # lr / (1 - beta1^t)
    ROOT = 1  # sqrt(1 - beta2^t)


@dataclass(frozen=True)
class Kind:
    """What a launch is compiled for."""

    param: torch.dtype
    state: torch.dtype
    rounding: Rounding


@dataclass
class Tables:
    """One launch: tensors of one kind on one device. Tables lie on the CPU; a backend may keep copies in ``cache``."""

    kind: Kind
    device: torch.device
    slots: torch.Tensor  # int64 [tensors, len(Slot)]
    hypers: torch.Tensor  # fp32 [*, len(Hyper)]
    cohorts: torch.Tensor  # fp32 [*, len(Cohort)]
    tensors: list[dict[Slot, torch.Tensor]]  # what the addresses belong to, but for gradients
    grads: list[torch.Tensor] = field(default_factory=list)  # of this step, contiguous
    cache: dict[str, object] = field(default_factory=dict)


def stream(seed: int, step: int, ordinal: int) -> int:
    """Where the random numbers of one tensor's step begin (int64).

    Coordinate c takes the top 16 bits of SplitMix64's output at c: it depends on seed, step, the parameter's ordinal
    and the coordinate in the whole parameter, so not on how the parameter is sharded.
    """
    return signed(mixed(mixed(mixed(seed) ^ step) ^ ordinal))
