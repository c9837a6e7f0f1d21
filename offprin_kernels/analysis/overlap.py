"""How many changed weights lie in weight masks of the base, beside what null models expect."""

from __future__ import annotations

import numpy as np
import torch

from .. import masks, nulls
from ..bitmask import BitMask
from ..ops import update_scan as op
from ..ops.subspace import TopK
from ..ops.update_scan import Output, Rule
from .rows import Tally

# Elements of a mask that are unpacked at once where its exponents are counted.
COUNTED_AT_ONCE = 1 << 22
BITWISE = (Rule.parse("bitwise"),)


def chosen(weight: torch.Tensor, factors: TopK, alpha: float) -> dict[str, Chosen]:
    """The weight masks of a base weight, counted."""
    principal = masks.principal_mask(factors, weight.shape, alpha)
    low = masks.low_magnitude_mask(weight, alpha)
    found = {"principal": principal, "low": low, "safe": low | ~principal}
    return {kind: Chosen(weight, mask) for kind, mask in found.items()}


def overlaps(found: dict[str, Chosen], update: BitMask, tally: Tally, total: int) -> dict:
    """Columns of one run: the changed weights in each mask, beside what null models expect."""
    everything, changed = tally.exponent_histogram
    count = int(changed.sum())
    row: dict = {"changed": count}
    visible = tally.isotropic
    if visible is not None:
        visible = np.divide(visible, everything, out=np.zeros(len(everything)), where=everything > 0)
    for kind, mask in found.items():
        inside, size = (mask.mask & update).count(), int(mask.exponents.sum())
        uniform = nulls.stratified_intersection([total], [size], [count])
        by_exponent = nulls.stratified_intersection(everything, mask.exponents, changed)
        margin = nulls.margin_null(mask.rows, mask.columns, tally.row_counts, tally.col_counts)
        row |= {
            f"{kind}_size": size,
            f"{kind}_changed": inside,
            f"{kind}_expected_uniform": uniform.mean,
            f"{kind}_expected_exponent": by_exponent.mean,
            f"{kind}_expected_margin": margin.intersection,
            f"{kind}_expected_isotropic": isotropic_share(visible, mask.exponents, everything, count),
            f"{kind}_variance_uniform": uniform.variance,
            f"{kind}_variance_exponent": by_exponent.variance,
            f"{kind}_excess": (inside - by_exponent.mean) / count if count else None,
            f"{kind}_z_uniform": uniform.z_score(inside),
            f"{kind}_z_exponent": by_exponent.z_score(inside),
        }
    return row


def isotropic_share(visible: np.ndarray | None, inside: np.ndarray, everything: np.ndarray, count: int) -> float | None:
    """How many of ``count`` changed weights an isotropic update would have inside a mask; by exponent all of these."""
    if visible is None:
        return None
    expected = float(everything @ visible)
    return float(inside @ visible) / expected * count if expected else 0.0


class Chosen:
    """A weight mask with its coordinates by exponent of the weight, by row and by column."""

    def __init__(self, weight: torch.Tensor, mask: BitMask) -> None:
        self.mask = mask
        exponents = torch.zeros(256, dtype=torch.int64)
        rows, columns = [], torch.zeros(weight.shape[1], dtype=torch.int64)
        step = max(1, COUNTED_AT_ONCE // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            # a scan counts what changed: flip the last bit of just these weights
            part = weight[start : start + step].bfloat16()
            inside = mask[start : start + step].to_dense()
            flipped = (part.view(torch.int16) ^ inside).view(torch.bfloat16)
            counts = Output.EXPONENT_HISTOGRAM | Output.ROWS | Output.COLUMNS
            raw = op.scan(part.contiguous(), flipped, BITWISE, counts)
            exponents += raw.exponent_histogram[1].cpu()
            rows.append(raw.row_counts.cpu())
            columns += raw.col_counts.cpu()
        self.exponents = exponents.numpy()
        self.rows, self.columns = torch.cat(rows).numpy(), columns.numpy()
