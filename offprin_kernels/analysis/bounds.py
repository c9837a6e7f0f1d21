"""Bounds beside observations: no theorem is taken for granted, and none is reported without what it bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .tables import Tables


@dataclass(frozen=True)
class Bound:
    """A theorem, the column it bounds, and what the observation's own error is."""

    name: str
    formula: str
    observed: tuple[str, ...]  # the largest of these columns
    bound: str
    error: str | None = None
    unit: str = ""  # of both: empty for a ratio
    most: float = np.inf  # a bound of so much, or more, says nothing


BOUNDS = (
    Bound("Mirsky", "NSS <= ||D||_F / ||W0||_F", ("nss",), "nss_mirsky", "nss_error"),
    Bound("Mirsky, top k", "NSS_k <= ||D||_F / ||s_k(W0)||_2", ("nss_k",), "nss_k_mirsky", "nss_k_error"),
    Bound("Weyl", "max |s_i(W+) - s_i(W0)| <= ||D||_2", ("largest_shift",), "update_spectral_norm", "shift_error",
          "of W"),
    Bound("Ky Fan", "| ||W+||_(k) - ||W0||_(k) | <= k ||D||_2", ("ky_fan_shift",), "ky_fan", "ky_fan_error",
          "of W"),
    Bound("Wedin", "largest angle <= asin(||D||_2 / (gap - ||D||_2))", ("left_degrees", "right_degrees"),
          "wedin_degrees", "resolution_degrees", "degrees", 90.0),
)  # fmt: skip


@dataclass(frozen=True)
class Beside:
    """One bound in one run, over its matrices. None where no matrix has both numbers."""

    run: str
    bound: Bound
    matrices: int
    without: int  # matrices where the bound says nothing, or the observation is below resolution
    observed: float | None  # medians
    allowed: float | None
    closest: float | None  # the largest observation relative to its bound
    exceeded: int  # by more than the observation's own error: should be 0


def beside(tables: Tables) -> list[Beside]:
    """Every bound for every run; empty where no spectra were measured."""
    rows = tables.geometry
    if rows is None or not rows.has("nss_k"):
        return []
    wanted = [bound for bound in BOUNDS if rows.has(bound.bound)]
    found = []
    for run in tables.runs:
        mine = rows.where(rows.texts("run") == run)
        for bound in wanted:
            seen = np.fmax.reduce([mine.numbers(column) for column in bound.observed])
            limit = mine.numbers(bound.bound)
            error = mine.numbers(bound.error) if bound.error else np.zeros(len(mine))
            both = np.isfinite(seen) & np.isfinite(limit) & (limit < bound.most)
            seen, limit, error = seen[both], limit[both], np.nan_to_num(error[both])
            # one part in a million for rounding, beside the error that the measurement states
            exceeded = int((seen > limit * (1 + 1e-6) + error).sum())
            ratio = np.divide(seen, limit, out=np.zeros_like(seen), where=limit > 0)
            some = len(seen) > 0
            found.append(
                Beside(run, bound, len(seen), len(mine) - len(seen), float(np.median(seen)) if some else None,
                       float(np.median(limit)) if some else None, float(ratio.max()) if some else None, exceeded)
            )  # fmt: skip
    return found
