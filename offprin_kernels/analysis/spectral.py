"""Geometry of one linear layer's updates: angles and spectra, energies, overlaps with weight masks; a row per run.

The base's factors, spectrum and masks are computed once for all runs. Every number stands beside its resolution, bound
or null.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .. import geometry, masks, nulls
from ..bitmask import BitMask
from ..numerics import bf16_codes
from ..ops import update_scan as op
from ..ops.subspace import topk_svd
from ..ops.update_scan import Output
from .plan import Plan, Unit
from .schema import GEOMETRY_COLUMNS, GEOMETRY_KEYS

# Elements looked at at once where exponents are counted.
COUNTED_AT_ONCE = 1 << 22


def wanted(unit: Unit, plan: Plan) -> bool:
    """Whether this unit gets geometry: linear layers only, as the source has it."""
    return bool(plan.options.metrics) and unit.linear and min(unit.rows, unit.columns) > 0


def measure_geometry(unit: Unit, plan: Plan, device: torch.device) -> list[dict]:
    """Rows of ``geometry.parquet`` for one unit."""
    base = unit.base.read(plan.base).to(device)
    known: Base | str = Base(base, plan) if bool(torch.isfinite(base).all()) else "NaN or Inf in the base"
    rows = []
    for run, partner in unit.partners:
        # every column, so that a row without results has them too
        columns = [column for metric in plan.options.metrics for column in GEOMETRY_COLUMNS[metric]]
        row: dict = dict.fromkeys([*GEOMETRY_KEYS, *columns]) | {
            "run": plan.names[run],
            "name": unit.name,
            "layer": unit.layer,
            "kind": unit.kind,
            "rows": unit.rows,
            "columns": unit.columns,
            "k": min(plan.options.k, unit.rows, unit.columns),
            "alpha": plan.options.alpha,
        }
        tuned = partner.tuned.read(plan.tuned[run]).to(device)
        if isinstance(known, str):
            row["note"] = known
        elif not bool(torch.isfinite(tuned).all()):
            row["note"] = "NaN or Inf in the tuned weight"
        else:
            for metric in plan.options.metrics:
                row |= getattr(known, metric)(tuned)
        rows.append(row)
    return rows


class Base:
    """What is computed once of a base weight, and a method for each metric of a tuned one."""

    def __init__(self, weight: torch.Tensor, plan: Plan) -> None:
        options = plan.options
        self.weight, self.rule, self.tolerance = weight, options.rules[0], options.tol_degrees
        k = min(options.k, *weight.shape)
        # converged further than its tuned weights: the base's own error would inflate their angles
        self.factors = topk_svd(weight, k, tol_degrees=options.tol_degrees / 4)
        if "spectrum" in options.metrics:
            self.full = geometry.spectrum(weight)
        if "masks" in options.metrics:
            principal = masks.principal_mask(self.factors, weight.shape, options.alpha)
            low = masks.low_magnitude_mask(weight, options.alpha)
            self.chosen = {"principal": principal, "low": low, "safe": low | ~principal}
            self.exponents = {kind: exponent_counts(weight, mask) for kind, mask in self.chosen.items()}

    def spectrum(self, tuned: torch.Tensor) -> dict:
        """Angles of the top-k subspaces, shift of the spectrum, and what bounds them."""
        angles = geometry.principal_angles(self.factors, tuned, self.factors.k, tol_degrees=self.tolerance)
        shift = geometry.normalized_spectral_shift(self.full, tuned, weight=self.weight)
        bounds = geometry.bounds(self.factors, angles.tuned, self.weight, tuned)
        largest = bounds.update_spectral_norm
        return {
            "left_degrees": angles.max_left,
            "right_degrees": angles.max_right,
            "left_median_degrees": geometry.resolved(angles.left.median()),
            "right_median_degrees": geometry.resolved(angles.right.median()),
            "resolution_degrees": angles.resolution_degrees,
            "converged": angles.converged,
            "base_error_degrees": float(self.factors.error_degrees),
            "method": angles.tuned.method,
            "wedin_degrees": bounds.wedin_degrees,
            "gap": float(self.factors.gap),
            "nss": shift.nss,
            "nss_error": shift.error,
            "nss_mirsky": shift.mirsky,
            "nss_isotropic": shift.isotropic,
            "nss_k": bounds.observed_nss_k,
            "largest_shift": bounds.observed_shift,
            "update_spectral_norm": largest,
            "stable_rank_base": self.full.stable_rank,
            "stable_rank_update": (bounds.update_norm / largest) ** 2 if largest else None,
        }

    def energy(self, tuned: torch.Tensor) -> dict:
        """Shares of the update's energy in the base's top-k subspaces, beside isotropic values; null for no update."""
        found = geometry.update_energy(self.factors, tuned.float() - self.weight.float())
        shares = {"left": found.left, "right": found.right, "both": found.both}
        return {
            **{f"energy_{side}": None if math.isnan(share) else share for side, share in shares.items()},
            "energy_left_isotropic": found.isotropic_left,
            "energy_right_isotropic": found.isotropic_right,
            "energy_both_isotropic": found.isotropic_both,
        }

    def masks(self, tuned: torch.Tensor) -> dict:
        """How many changed weights lie in each weight mask, and how many would if only size or exponent mattered."""
        raw = op.scan(self.weight, tuned, (self.rule,), Output.MASK | Output.EXPONENT_HISTOGRAM)
        update = BitMask(raw.mask, self.weight.shape, check=False)
        everything, changed = raw.exponent_histogram.cpu().numpy()
        row: dict = {"changed": int(changed.sum())}
        for kind, mask in self.chosen.items():
            inside = (mask & update).count()
            by_exponent = nulls.stratified_intersection(everything, self.exponents[kind], changed)
            row |= {
                f"{kind}_size": int(self.exponents[kind].sum()),
                f"{kind}_changed": inside,
                f"{kind}_expected_uniform": row["changed"] * mask.density,
                f"{kind}_expected_exponent": by_exponent.mean,
                f"{kind}_variance_exponent": by_exponent.variance,
            }
        return row


def exponent_counts(weight: torch.Tensor, mask: BitMask) -> np.ndarray:
    """Coordinates of a mask by the exponent field of the weight in bf16: int64 ``[256]``."""
    counts = torch.zeros(256, dtype=torch.int64, device=weight.device)
    step = max(1, COUNTED_AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        exponents = (bf16_codes(weight[start : start + step]) >> 7) & 0xFF
        counts += torch.bincount(exponents[mask[start : start + step].to_dense()], minlength=256)
    return counts.cpu().numpy()
