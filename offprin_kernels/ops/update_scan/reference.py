"""The definition of correct for ``update_scan``: plain PyTorch, any device, whole-tensor temporaries, no hurry."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import numerics as num
from ...packing import matrix_shape
from ..mask_algebra.reference import pack
from . import contract as c


def changed(a: torch.Tensor, b: torch.Tensor, rule: c.Rule) -> torch.Tensor:
    """bool: which coordinates changed between two tensors of bf16 codes (int32)."""
    if rule.code == c.RuleCode.STORAGE:
        return a != b
    a_nan, b_nan = num.is_nan_code(a), num.is_nan_code(b)
    if rule.code in (c.RuleCode.BITWISE, c.RuleCode.ULP):
        differs = num.ulp_distance(a, b) > rule.threshold
        return torch.where(a_nan | b_nan, a_nan != b_nan, differs)
    return changed_values(num.codes_to_fp32(a), num.codes_to_fp32(b), rule)


def changed_values(a: torch.Tensor, b: torch.Tensor, rule: c.Rule) -> torch.Tensor:
    """bool: which coordinates changed between two fp32 tensors; the un-cast comparison. Not defined for ``ulp``."""
    if rule.code == c.RuleCode.STORAGE:
        return num.fp32_bits(a) != num.fp32_bits(b)
    a_nan, b_nan = a.isnan(), b.isnan()
    if rule.code == c.RuleCode.BITWISE:
        differs = a != b
    else:
        threshold = torch.tensor(rule.threshold, dtype=torch.float32, device=a.device)
        if rule.code == c.RuleCode.ETA:
            threshold = threshold * torch.maximum(a.abs(), b.abs())
        # Inf against anything else is a change: Inf > eta * Inf would hide it.
        differs = ((b - a).abs() > threshold) | ((a.isinf() | b.isinf()) & (a != b))
    return torch.where(a_nan | b_nan, a_nan != b_nan, differs)


def ulp_bins(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Histogram bin (int64) of each coordinate's ULP distance."""
    distance = num.ulp_distance(a, b)
    bins = torch.zeros_like(distance, dtype=torch.int64)
    for j in range(c.ULP_NAN_BIN - 1):
        bins += distance >= (1 << j)
    a_nan, b_nan = num.is_nan_code(a), num.is_nan_code(b)
    bins[a_nan & b_nan] = 0
    bins[a_nan != b_nan] = c.ULP_NAN_BIN
    return bins


def norm_row(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float64 [NORMS] of two fp32 tensors: ||a||^2, ||b - a||^2, <a, b - a>, max |b - a| (the last in fp32)."""
    if a.numel() == 0:
        return torch.zeros(c.NORMS, dtype=torch.float64, device=a.device)
    wide, update = a.double(), b.double() - a.double()
    largest = (b - a).abs().max().double()
    return torch.stack([(wide * wide).sum(), (update * update).sum(), (wide * update).sum(), largest])


def scan(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[c.Rule],
    outputs: c.Output,
    additive: bool,
    mask: torch.Tensor | None = None,
) -> c.ScanTensors:
    """All outputs of one scan; ``rules[0]`` decides mask, rows, columns and the histogram of changed exponents."""
    m, n = matrix_shape(base.shape)
    base, tuned = base.reshape(m, n), tuned.reshape(m, n)
    base32, tuned32 = num.to_fp32(base), num.to_fp32(tuned)
    if additive:
        tuned32 = base32 + tuned32
    a = num.bf16_codes(base)
    b = num.round_to_bf16_codes(tuned32) if additive else num.bf16_codes(tuned)
    uncast = c.has_uncast(base.dtype, tuned.dtype, additive)

    out = c.allocate(base, tuned, len(rules), outputs, additive, mask)
    dense = changed(a, b, rules[0])
    for i, rule in enumerate(rules):
        out.rule_counts[i, 0] = changed(a, b, rule).sum()
        has_count = uncast and rule.code != c.RuleCode.ULP
        out.rule_counts[i, 1] = changed_values(base32, tuned32, rule).sum() if has_count else c.UNDEFINED
    if c.Output.MASK in outputs:
        out.mask.copy_(pack(dense))
    if c.Output.ROWS in outputs:
        out.row_counts.copy_(dense.sum(1))
    if c.Output.COLUMNS in outputs:
        out.col_counts.copy_(dense.sum(0))
    a_nan, b_nan = num.is_nan_code(a), num.is_nan_code(b)
    a_zero, b_zero = (a & num.MAGNITUDE) == 0, (b & num.MAGNITUDE) == 0
    if c.Output.TRANSITIONS in outputs:
        numbers = ~(a_nan | b_nan)
        out.counters[c.SIGN_FLIPS] = (((a ^ b) & num.SIGN != 0) & numbers & ~a_zero & ~b_zero).sum()
        out.counters[c.ZERO_TO_NONZERO] = (a_zero & ~b_zero & numbers).sum()
        out.counters[c.NONZERO_TO_ZERO] = (b_zero & ~a_zero & numbers).sum()
    if c.Output.NONFINITE in outputs:
        out.counters[c.NAN_BASE], out.counters[c.INF_BASE] = a_nan.sum(), num.is_inf_code(a).sum()
        out.counters[c.NAN_TUNED], out.counters[c.INF_TUNED] = b_nan.sum(), num.is_inf_code(b).sum()
    if c.Output.ULP_HISTOGRAM in outputs:
        out.ulp_histogram.copy_(torch.bincount(ulp_bins(a, b).flatten(), minlength=c.ULP_BINS))
    if c.Output.EXPONENT_HISTOGRAM in outputs:
        exponents = ((a & num.MAGNITUDE) >> num.MANTISSA_BITS).to(torch.int64)
        out.exponent_histogram[0] = torch.bincount(exponents.flatten(), minlength=c.EXPONENT_BINS)
        out.exponent_histogram[1] = torch.bincount(exponents[dense], minlength=c.EXPONENT_BINS)
    if c.Output.NORMS in outputs:
        out.norms[0] = norm_row(num.codes_to_fp32(a), num.codes_to_fp32(b))
        out.norms[1] = norm_row(base32, tuned32) if uncast else c.UNDEFINED
    return out
