"""The definition of correct for ``masked_adamw``: plain PyTorch, any device, one tensor and an index list at a time.

Every operation is fp32, correctly rounded; ``fma`` is a product and a sum with one rounding. The order is that of
``torch.optim.AdamW(fused=True)`` on processors with fused multiply-adds.
"""

from __future__ import annotations

import torch

from ... import numerics
from ...packing import zeros
from ..mask_algebra import reference as mask_algebra
from .contract import Cohort, Hyper, Kind, Rounding, Slot, Tables


def step(tables: Tables, track: bool) -> torch.Tensor | None:
    """Steps every tensor in place; visible changes per tensor, int64 ``[tensors]``, if tracked."""
    counts = zeros((len(tables.tensors),), torch.int64, tables.device)
    for index, (row, tensors, grad) in enumerate(zip(tables.slots.tolist(), tables.tensors, tables.grads, strict=True)):
        if grad is not None and row[Slot.NUMEL]:
            counts[index] = step_one(tables, row, tensors, grad)
    return counts if track else None


def step_one(tables: Tables, row: list[int], tensors: dict[Slot, torch.Tensor], gradient: torch.Tensor) -> int:
    kind = tables.kind
    param, grad = tensors[Slot.PARAM].view(-1), gradient.view(-1)
    device = param.device
    at = coordinates(tensors.get(Slot.MASK), row[Slot.NUMEL], device)
    hyper = tables.hypers[row[Slot.HYPER]].to(device)
    cohort = row[Slot.FIRST_COHORT] + (tensors[Slot.COHORT].long() if Slot.COHORT in tensors else torch.zeros_like(at))
    bias = tables.cohorts.to(device)[cohort]

    g = grad[at].float()
    if hyper[Hyper.SCALE] != 1:
        g = g / hyper[Hyper.SCALE]
    g = g * hyper[Hyper.SIGN]
    before = param[at]
    w = opened(kind, before, tensors.get(Slot.EXTRA)) * hyper[Hyper.DECAY]
    m, v = tensors[Slot.EXP_AVG].float(), tensors[Slot.EXP_AVG_SQ].float()
    m = numerics.fma(hyper[Hyper.LERP], g - m, g if hyper[Hyper.NEAR_GRAD] else m)
    v = numerics.fma(hyper[Hyper.SQUARE] * g, g, hyper[Hyper.BETA2] * v)
    # fp32 square roots of PyTorch are not always correctly rounded; rounded from fp64 they are
    denominator = v.double().sqrt().float() / bias[:, Cohort.ROOT] + hyper[Hyper.EPS]
    w = w - (bias[:, Cohort.STEP_SIZE] * m) / denominator

    put(tensors[Slot.EXP_AVG], m)
    put(tensors[Slot.EXP_AVG_SQ], v)
    after, extra = closed(kind, w, row[Slot.STREAM], at + row[Slot.OFFSET])
    if extra is not None:
        tensors[Slot.EXTRA].copy_(extra)
    param[at] = after
    changed = numerics.visibly_differ(numerics.bf16_codes(before), numerics.bf16_codes(after))
    if Slot.CHANGED in tensors:
        words = mask_algebra.pack(changed[None])[0]
        tensors[Slot.CHANGED].bitwise_or_(words)
    return int(changed.sum())


def coordinates(words: torch.Tensor | None, numel: int, device: torch.device) -> torch.Tensor:
    """Flat indices of the mask, ascending, int64."""
    if words is None:
        return torch.arange(numel, device=device)
    return mask_algebra.unpack(words.view(1, -1), numel)[0].nonzero()[:, 0]


def opened(kind: Kind, param: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
    """Parameters in fp32, with what the rounding kept of them."""
    if extra is None:
        return param.float()
    if kind.rounding == Rounding.MASTER:
        return numerics.join_master(numerics.bf16_codes(param), extra.to(torch.int32) & 0xFFFF)
    return param.float() + extra.float()


def closed(kind: Kind, w: torch.Tensor, stream: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored parameters, and what the rounding keeps beside them."""
    if kind.param == torch.float32:
        return w, None
    if kind.rounding == Rounding.MASTER:
        codes, low = numerics.split_master(w)
        return as_bf16(codes), low.to(torch.int16)
    if kind.rounding == Rounding.STOCHASTIC:
        noise = numerics.shifted_right(numerics.splitmix64(stream, places), 48)
        return as_bf16(numerics.round_stochastic(w, noise)), None
    codes = numerics.round_to_bf16_codes(w)
    if kind.rounding == Rounding.KAHAN:
        # nothing can be kept of what overflowed
        lost = torch.where(numerics.is_finite_code(codes), w - numerics.codes_to_fp32(codes), 0.0)
        return as_bf16(codes), as_bf16(numerics.round_to_bf16_codes(lost))
    return as_bf16(codes), None


def as_bf16(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.int16).view(torch.bfloat16)


def put(state: torch.Tensor, values: torch.Tensor) -> None:
    state.copy_(values if state.dtype == torch.float32 else as_bf16(numerics.round_to_bf16_codes(values)))
