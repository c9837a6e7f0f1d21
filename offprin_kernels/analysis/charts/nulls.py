"""How null models look, the same in every chart; and which tensors they can be held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tables import Frame
from .model import INK, Series, plain

# key: (name in legends, symbol)
NULLS = {
    "uniform": ("if uniform", "circle-open"),
    "exponent": ("if by exponent", "diamond-open"),
    "margin": ("if by margins", "square-open"),
    "isotropic": ("if isotropic", "x-thin"),
}
EXPLAINED = (
    "Nulls: uniform, masks of the same density shuffled over all weights (Bernoulli); by exponent, shuffled among "
    "weights of equal exponent, about what rounding alone brings; by margins, only the densities of rows and columns "
    "are kept; isotropic, a Gaussian update of the same norm, rounded to bf16."
)
WHY_NOT = "NaN or Inf, or not stored in bf16"


def null_points(kind: str, x: Sequence[float], y: Sequence[float | None], hover: Sequence[str] = ()) -> Series:
    name, symbol = NULLS[kind]
    return Series(name, x, plain(y), "points", INK, symbol=symbol, hover=hover)


def comparable(rows: Frame, null: str) -> Frame:
    """The rows to which this column's null applies, so that sums of both are over the same; all if it does to none."""
    known = np.isfinite(rows.numbers(null))
    return rows.where(known) if known.any() and not known.all() else rows


def left_out(rows: Frame, null: str, what: str = "tensors") -> str:
    """``1 of 28 tensors left out: NaN or Inf``; empty where the null applies to all rows, or to none."""
    known = np.isfinite(rows.numbers(null))
    if known.all() or not known.any():
        return ""
    lost = rows.where(~known)
    return f"{len(lost):,} of {len(rows):,} {what} left out: {listed_reasons(lost)}"


def listed_reasons(rows: Frame) -> str:
    """Why an isotropic update's rounding says nothing of these rows."""
    if "flagged_nonfinite" not in rows.arrow.column_names:
        return WHY_NOT
    flags = zip(rows.values("flagged_nonfinite"), rows.values("status"), strict=True)
    found = [
        "NaN or Inf" if flag else "not stored in bf16" if status == "cast" else "no null" for flag, status in flags
    ]
    return " or ".join(sorted(set(found)))
