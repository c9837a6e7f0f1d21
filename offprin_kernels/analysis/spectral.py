"""Geometry of one linear layer's updates: angles and spectra, energies, overlaps with weight masks; a row per run.

The base's factors, spectrum and masks are computed once for all runs. Every number stands beside its resolution, bound
or null.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch

from .. import geometry, masks, nulls
from ..bitmask import BitMask
from ..ops import update_scan as op
from ..ops.subspace import TopK, element, topk_svd
from ..ops.update_scan import Output, Rule
from .plan import Plan, Unit
from .rows import Tally
from .schema import GEOMETRY_COLUMNS, GEOMETRY_KEYS

# Elements of a mask that are unpacked at once where its exponents are counted.
COUNTED_AT_ONCE = 1 << 22
SIDES: tuple[Literal["left"], Literal["right"], Literal["both"]] = ("left", "right", "both")
BITWISE = (Rule.parse("bitwise"),)


def wanted(unit: Unit, plan: Plan) -> bool:
    """Whether this unit gets geometry: linear layers only, as the source has it."""
    return bool(plan.options.metrics) and unit.linear and min(unit.rows, unit.columns) > 0


class Factors(NamedTuple):
    """Top-k factors of a base weight and, by run, of tuned ones, where they were computed in a batch."""

    base: TopK
    tuned: dict[int, TopK]


def factorise_together(
    units: Sequence[Unit], plan: Plan, tensors: Sequence[list[torch.Tensor]]
) -> list[Factors | None]:
    """Factors of equally shaped units in one batch per run; None for units with NaN or Inf.

    ``tensors``: for each unit, base and runs. Made for experts, of which a layer has a hundred: one launch serves all.
    """
    sound = [index for index, weights in enumerate(tensors) if all(map(finite, weights))]
    found: list[Factors | None] = [None] * len(units)
    if not sound:
        return found
    options, first = plan.options, units[0]
    k = min(options.k, first.rows, first.columns)

    def stacked(run: int) -> torch.Tensor:
        return torch.stack([tensors[index][run] for index in sound])

    base = topk_svd(stacked(0), k, tol_degrees=options.tol_degrees / 4)
    runs = [run for run, _ in first.partners] if "spectrum" in options.metrics else []
    tuned = {
        run: topk_svd(stacked(1 + at), k, tol_degrees=options.tol_degrees, warm_start=base)
        for at, run in enumerate(runs)
    }
    for place, index in enumerate(sound):
        found[index] = Factors(element(base, place), {run: element(batch, place) for run, batch in tuned.items()})
    return found


class Geometry:
    """What is computed once of a base weight, and a row of ``geometry.parquet`` for each tuned one."""

    def __init__(self, unit: Unit, plan: Plan, base: torch.Tensor, known: Factors | None = None) -> None:
        self.known = known
        self.unit, self.options, self.names = unit, plan.options, plan.names
        self.k = min(plan.options.k, unit.rows, unit.columns)
        self.base = base
        self.fit = finite(base)

    def rows(self, run: int, tuned: torch.Tensor, update: BitMask, tally: Tally) -> tuple[dict, dict | None]:
        """Rows of ``geometry`` and (or None) ``curves``; ``update`` and ``tally`` are what the scan found."""
        unit, options = self.unit, self.options
        # every column, so that a row without results has them too
        columns = [column for metric in options.metrics for column in GEOMETRY_COLUMNS[metric]]
        row: dict = dict.fromkeys([*GEOMETRY_KEYS, *columns]) | {
            "run": self.names[run],
            "name": unit.name,
            "layer": unit.layer,
            "kind": unit.kind,
            "rows": unit.rows,
            "columns": unit.columns,
            "k": self.k,
            "alpha": options.alpha,
        }
        if not self.fit or not finite(tuned):
            row["note"] = "NaN or Inf in the " + ("tuned weight" if self.fit else "base")
            return row, None
        curves = None
        difference = tuned.float() - self.base.float()
        if "spectrum" in options.metrics:
            found, curves = self.spectrum(run, tuned, difference)
            row |= found
            curves = {key: row[key] for key in ("run", "name", "layer", "kind", "k", "resolution_degrees")} | curves
        if "energy" in options.metrics:
            row |= self.energy(difference)
        if "masks" in options.metrics:
            row |= self.masks(update, tally)
        return row, curves

    # ---- of the base, once

    @cached_property
    def solved(self) -> tuple[geometry.Spectrum | None, TopK]:
        """All singular values, where these are asked for, and the top-k factors.

        Converged further than those of tuned weights: the base's own error would inflate their angles.
        """
        tolerance = self.options.tol_degrees / 4
        if self.known:
            return geometry.spectrum(self.base) if self.whole else None, self.known.base
        if self.whole:
            return geometry.spectrum_and_factors(self.base, self.k, tol_degrees=tolerance)
        return None, topk_svd(self.base, self.k, tol_degrees=tolerance)

    @property
    def whole(self) -> bool:
        """Whether all singular values are wanted, not the top k alone."""
        return "spectrum" in self.options.metrics and self.options.nss == "full"

    @property
    def factors(self) -> TopK:
        return self.solved[1]

    @cached_property
    def chosen(self) -> dict[str, Chosen]:
        """The weight masks of the base, counted."""
        principal = masks.principal_mask(self.factors, self.base.shape, self.options.alpha)
        low = masks.low_magnitude_mask(self.base, self.options.alpha)
        found = {"principal": principal, "low": low, "safe": low | ~principal}
        return {kind: Chosen(self.base, mask) for kind, mask in found.items()}

    # ---- of a tuned weight

    def spectrum(self, run: int, tuned: torch.Tensor, update: torch.Tensor) -> tuple[dict, dict]:
        """Angles of the top-k subspaces, shift of the spectrum, what bounds them, and what chance would give."""
        full, factors = self.solved
        sketch = geometry.update_sketch(update, self.k)
        # factors of an equal weight are these: an iteration would add its own error
        after = (self.known.tuned[run] if self.known else tuned) if sketch.norm else factors
        angles = geometry.principal_angles(factors, after, self.k, tol_degrees=self.options.tol_degrees)
        top = geometry.top_shift(factors, angles.tuned, sketch.norm)
        base_norm, tuned_norm = norm_of(self.base), norm_of(tuned)
        shift = None
        if full is not None:
            shift = geometry.normalized_spectral_shift(full, tuned, weight=self.base, update=update)
        values = full.values if full is not None else geometry.estimated_values(factors, base_norm)
        bounds = geometry.bounds(factors, angles, self.base, sketch)
        largest = sketch.spectral_norm
        left, right = nulls.isotropic_angles(values, self.unit.rows, self.unit.columns, self.k, sketch.norm)
        row = {
            "left_degrees": angles.max_left,
            "right_degrees": angles.max_right,
            "left_median_degrees": geometry.resolved(angles.left.median()),
            "right_median_degrees": geometry.resolved(angles.right.median()),
            "left_degrees_isotropic": float(left[0]),
            "right_degrees_isotropic": float(right[0]),
            "resolution_degrees": angles.resolution_degrees,
            "converged": angles.converged,
            "base_error_degrees": float(factors.error_degrees),
            "method": angles.tuned.method,
            "wedin_degrees": bounds.wedin_degrees,
            "gap": float(factors.gap),
            "nss": shift.nss if shift else None,
            "nss_error": shift.error if shift else None,
            "nss_mirsky": shift.mirsky if shift else None,
            "nss_isotropic": shift.isotropic if shift else None,
            "nss_k": top.nss,
            "nss_k_error": top.error,
            "nss_k_mirsky": top.mirsky,
            "nss_k_isotropic": top.isotropic,
            "largest_shift": bounds.observed_shift,
            "update_spectral_norm": largest,
            "ky_fan": bounds.ky_fan,
            "ky_fan_shift": bounds.observed_ky_fan,
            "stable_rank_base": stable_rank(base_norm, factors),
            "stable_rank_tuned": stable_rank(tuned_norm, angles.tuned),
            "stable_rank_update": (sketch.norm / largest) ** 2 if largest else None,
            "update_top_energy": sketch.top_energy if largest else None,
        }
        return row, {
            "left": known(angles.left),
            "right": known(angles.right),
            "left_isotropic": left.tolist(),
            "right_isotropic": right.tolist(),
            "values_base": factors.S.tolist(),
            "values_tuned": angles.tuned.S.tolist(),
        }

    def energy(self, update: torch.Tensor) -> dict:
        """Shares of the update's energy in the base's top-k subspaces, beside isotropic values; null for no update."""
        found = geometry.update_energy(self.factors, update)
        row: dict = {}
        for side in SIDES:
            share, null = getattr(found, side), nulls.energy_null(self.unit.rows, self.unit.columns, self.k, side)
            none = math.isnan(share)
            row |= {
                f"energy_{side}": None if none else share,
                f"energy_{side}_isotropic": null.mean,
                f"energy_{side}_z": None if none else null.z_score(share),
            }
        return row

    def masks(self, update: BitMask, tally: Tally) -> dict:
        """How many changed weights lie in each weight mask, beside what null models expect."""
        everything, changed = tally.exponent_histogram
        count = int(changed.sum())
        row: dict = {"changed": count}
        densities = np.divide(tally.isotropic, everything, out=np.zeros(len(everything)), where=everything > 0)
        isotropic = float(tally.isotropic.sum())
        for kind, mask in self.chosen.items():
            inside, size = (mask.mask & update).count(), int(mask.exponents.sum())
            uniform = nulls.stratified_intersection([self.unit.total], [size], [count])
            by_exponent = nulls.stratified_intersection(everything, mask.exponents, changed)
            margin = nulls.margin_null(mask.rows, mask.columns, tally.row_counts, tally.col_counts)
            # the share of an isotropic update that falls inside, of as many changed weights
            share = float(mask.exponents @ densities) / isotropic if isotropic else 0.0
            row |= {
                f"{kind}_size": size,
                f"{kind}_changed": inside,
                f"{kind}_expected_uniform": uniform.mean,
                f"{kind}_expected_exponent": by_exponent.mean,
                f"{kind}_expected_margin": margin.intersection,
                f"{kind}_expected_isotropic": share * count,
                f"{kind}_variance_uniform": uniform.variance,
                f"{kind}_variance_exponent": by_exponent.variance,
                f"{kind}_excess": (inside - by_exponent.mean) / count if count else None,
                f"{kind}_z_uniform": uniform.z_score(inside),
                f"{kind}_z_exponent": by_exponent.z_score(inside),
            }
        return row


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


def norm_of(weight: torch.Tensor) -> float:
    """Frobenius norm, in fp64."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


def stable_rank(norm: float, factors: TopK) -> float:
    """||W||_F^2 / ||W||_2^2; 0 for a zero weight."""
    return (norm / float(factors.S[0])) ** 2 if norm else 0.0


def finite(weight: torch.Tensor) -> bool:
    low, high = torch.aminmax(weight)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def known(angles: torch.Tensor) -> list[float | None]:
    """Angles with None below resolution."""
    return [None if math.isnan(angle) else angle for angle in angles.tolist()]
