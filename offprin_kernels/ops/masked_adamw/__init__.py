"""``masked_adamw``: AdamW on the coordinates of a mask, many tensors to a launch, moments for those coordinates alone.

The optimizer made of it is :class:`offprin_kernels.optim.MaskedAdamW`. Coordinates outside the mask keep their bits: no
decay, no state. Arithmetic is fp32, with one rounding into the parameter; its order is that of ``torch.optim.AdamW``,
and every backend gives the same bits.

Source: Loshchilov and Hutter, arXiv 1711.05101; masks after arXiv 2511.08567, section 5.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..._backend import choose
from ...packing import zeros
from .. import mask_algebra
from .contract import BLOCK, DTYPE_CODES, EXTRA, Cohort, Hyper, Kind, Rounding, Slot, Tables, stream

__all__ = ["BACKENDS", "Part", "Rounding", "Setting", "Stepper", "block_prefix", "padded_words"]

BACKENDS = ("triton", "cpu", "reference")  # in order of preference


class Setting(NamedTuple):
    """What a group of tensors is stepped with."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False
    scale: float = 1.0  # gradients are divided by it


@dataclass
class Part:
    """One tensor, or one shard of it, and its state."""

    param: torch.Tensor  # bf16 or fp32, any shape
    exp_avg: torch.Tensor  # fp32 or bf16 [count]: one entry per coordinate in the mask, in flat order
    exp_avg_sq: torch.Tensor  # like exp_avg
    extra: torch.Tensor | None = None  # bf16 [count] (kahan), int16 [count] (master)
    words: torch.Tensor | None = None  # uint8 [padded_words(numel)]: the mask, flat; None: every coordinate
    prefix: torch.Tensor | None = None  # int64 [blocks + 1], see block_prefix; with words only
    cohort: torch.Tensor | None = None  # uint8 [count]: which of the step counts is a coordinate's; None: the first
    changed: torch.Tensor | None = None  # uint8 [8 * ceil(count / 64)]: or-ed with the visible changes, bit per entry
    offset: int = 0  # flat index of the first coordinate in the whole parameter
    ordinal: int = 0  # which parameter it is: keys the stochastic rounding
    group: int = 0  # which of a step's settings and counts of steps are its own
    name: str = ""  # what messages call it

    def __post_init__(self) -> None:
        if self.param.dtype not in DTYPE_CODES or self.exp_avg.dtype not in DTYPE_CODES:
            raise TypeError(
                f"masked_adamw steps bfloat16 and float32 parameters with moments of these types, "
                f"got {self.param.dtype} and {self.exp_avg.dtype}"
            )
        if (self.words is None) != (self.prefix is None):
            raise ValueError("a mask goes with its prefix sums; make them with block_prefix")


def padded_words(numel: int) -> int:
    """Bytes of a flat mask: one bit per coordinate, whole blocks."""
    return (numel + BLOCK - 1) // BLOCK * (BLOCK // 8)


def block_prefix(words: torch.Tensor) -> torch.Tensor:
    """How many set bits come before each block of a flat padded mask, and their total: int64 ``[blocks + 1]``."""
    counts = mask_algebra.row_counts(words.view(-1, BLOCK // 8))
    prefix = zeros((len(counts) + 1,), torch.int64, words.device)
    torch.cumsum(counts, 0, out=prefix[1:])
    return prefix


class Stepper:
    """Steps a fixed list of parts, again and again; keeps the tables of their addresses between steps."""

    def __init__(self, parts: Sequence[Part], rounding: Rounding | str = "nearest", backend: str | None = None) -> None:
        """Parts may differ in dtype and device; fp32 parameters are rounded to nearest whatever ``rounding`` says.

        Raises BackendUnavailable for a forced backend that cannot run on a part's device.
        """
        rounding = Rounding[rounding.upper()] if isinstance(rounding, str) else rounding
        self.parts = list(parts)
        groups: dict[tuple[torch.device, Kind], list[int]] = {}
        for index, part in enumerate(self.parts):
            own = rounding if part.param.dtype == torch.bfloat16 else Rounding.NEAREST
            if (EXTRA.get(own) is not None) != (part.extra is not None):
                raise ValueError(f"rounding {own.name.lower()!r} and the extra state of part {index} do not fit")
            kind = Kind(part.param.dtype, part.exp_avg.dtype, own)
            groups.setdefault((part.param.device, kind), []).append(index)
        # whole lists are compared with those of the gradients: quicker than tensor by tensor
        self.dtypes = [part.param.dtype for part in self.parts]
        self.shapes = [part.param.shape for part in self.parts]
        self.devices = [part.param.device for part in self.parts]
        self.launches = []
        for (device, kind), members in groups.items():
            chosen = choose(device, BACKENDS, backend)
            self.launches.append(Launch(kind, device, members, [self.parts[i] for i in members], chosen))

    def step(
        self,
        grads: Sequence[torch.Tensor],
        settings: Sequence[Setting],
        steps: Sequence[tuple[int, ...]],
        *,
        seed: int = 0,
        track: bool = False,
    ) -> list[tuple[list[int], torch.Tensor]]:
        """One step of every part, in place.

        Args:
            grads: a gradient per part, of its shape, dtype and device; not modified.
            settings: per group of parts.
            steps: per group, for each cohort of its parts, how many steps its coordinates have taken, with this one.
            seed: of stochastic rounding, which also depends on the first cohort's steps.
            track: count visible changes, and mark them in the parts' ``changed``.

        Returns:
            If tracked, per launch: indices of its parts, and their visible changes (int64, on the launch's device).
            A change is visible where the value in bf16 differs: +0 and -0 are one value, and so are all NaN.

        Raises:
            RuntimeError: a sparse gradient. ValueError: one of another shape, dtype or device than its part. Nothing
                has been stepped then.
        """
        if (
            [grad.dtype for grad in grads] != self.dtypes
            or [grad.shape for grad in grads] != self.shapes
            or [grad.device for grad in grads] != self.devices
            or any([grad.layout != torch.strided for grad in grads])  # noqa: C419  # lists are quicker
        ):
            refuse(self.parts, grads)
        hypers = as_table([hyper_row(setting) for setting in settings])
        cohorts = as_table([cohort_row(s, taken) for s, own in zip(settings, steps, strict=True) for taken in own])
        first = np.cumsum([0, *map(len, steps)])
        found = [launch.step(grads, hypers, cohorts, first, steps, seed, track) for launch in self.launches]
        torch.autograd.graph.increment_version([part.param for part in self.parts])
        return [
            (launch.members, counts) for launch, counts in zip(self.launches, found, strict=True) if counts is not None
        ]


class Launch:
    """The parts of one kind on one device."""

    def __init__(self, kind: Kind, device: torch.device, members: list[int], parts: list[Part], backend: str) -> None:
        self.members, self.parts = members, parts
        # contiguous twins of parameters that are not; stepped in their place and copied back
        self.twins = {i: torch.empty_like(p.param, memory_format=torch.contiguous_format).detach()
                      for i, p in enumerate(parts) if not p.param.is_contiguous()}  # fmt: skip
        module = {"reference": ".reference", "cpu": ".native", "triton": ".triton_kernel"}[backend]
        self.run = importlib.import_module(module, __package__).step
        tensors = [
            {
                Slot.PARAM: self.twins.get(i, part.param.detach()),
                Slot.EXP_AVG: part.exp_avg,
                Slot.EXP_AVG_SQ: part.exp_avg_sq,
                **{
                    column: tensor
                    for column, tensor in (
                        (Slot.EXTRA, part.extra),
                        (Slot.MASK, part.words),
                        (Slot.PREFIX, part.prefix),
                        (Slot.COHORT, part.cohort),
                        (Slot.CHANGED, part.changed),
                    )
                    if tensor is not None
                },
            }
            for i, part in enumerate(parts)
        ]
        self.table = np.zeros((len(parts), len(Slot)), dtype=np.int64)
        for row, held in zip(self.table, tensors, strict=True):
            for column, tensor in held.items():
                row[column] = tensor.data_ptr()
        self.groups = np.array([part.group for part in parts])
        self.table[:, Slot.HYPER] = self.groups
        self.table[:, Slot.NUMEL] = [part.param.numel() for part in parts]
        self.table[:, Slot.OFFSET] = [part.offset for part in parts]
        none = torch.empty(0)
        self.tables = Tables(kind, device, torch.from_numpy(self.table), none, none, tensors)

    def step(self, grads, hypers, cohorts, first, steps, seed: int, track: bool) -> torch.Tensor | None:
        held = [grads[i] for i in self.members]
        held = [grad if grad.is_contiguous() else grad.contiguous() for grad in held]
        tables = self.tables
        tables.grads, tables.hypers, tables.cohorts = held, hypers, cohorts
        self.table[:, Slot.GRAD] = [grad.data_ptr() for grad in held]
        self.table[:, Slot.FIRST_COHORT] = first[self.groups]
        if tables.kind.rounding == Rounding.STOCHASTIC:
            self.table[:, Slot.STREAM] = [stream(seed, steps[part.group][0], part.ordinal) for part in self.parts]
        for index, twin in self.twins.items():
            twin.copy_(self.parts[index].param.detach())
        counts = self.run(tables, track)
        for index, twin in self.twins.items():
            self.parts[index].param.detach().copy_(twin)
        return counts


def refuse(parts: Sequence[Part], grads: Sequence[torch.Tensor]) -> None:
    """Raises for the first gradient that does not fit its part."""
    for part, grad in zip(parts, grads, strict=True):
        param = part.param
        if grad.dtype != param.dtype or grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"{called(part)} is {tuple(param.shape)} {param.dtype} on {param.device}, its gradient "
                f"{tuple(grad.shape)} {grad.dtype} on {grad.device}; make them alike"
            )
        if grad.layout != torch.strided:
            raise RuntimeError(f"the gradient of {called(part)} has layout {grad.layout}; it must be dense")


def called(part: Part) -> str:
    return part.name or f"a {tuple(part.param.shape)} part"


def as_table(rows: list[list[float]]) -> torch.Tensor:
    """fp32, each number rounded once."""
    return torch.tensor(rows, dtype=torch.float64).float()


def hyper_row(setting: Setting) -> list[float]:
    row = [0.0] * len(Hyper)
    toward = 1 - setting.beta1
    row[Hyper.DECAY] = 1 - setting.lr * setting.weight_decay
    row[Hyper.NEAR_GRAD] = float(abs(np.float32(toward)) >= 0.5)
    row[Hyper.LERP] = float(np.float32(toward) - np.float32(1)) if row[Hyper.NEAR_GRAD] else toward
    row[Hyper.BETA2] = setting.beta2
    row[Hyper.SQUARE] = 1 - setting.beta2
    row[Hyper.EPS] = setting.eps
    row[Hyper.SIGN] = -1.0 if setting.maximize else 1.0
    row[Hyper.SCALE] = setting.scale
    return row


def cohort_row(setting: Setting, steps: int) -> list[float]:
    row = [0.0] * len(Cohort)
    row[Cohort.STEP_SIZE] = setting.lr / (1 - setting.beta1**steps)
    row[Cohort.ROOT] = (1 - setting.beta2**steps) ** 0.5
    return row
