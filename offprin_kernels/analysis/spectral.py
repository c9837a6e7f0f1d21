"""Geometry of one linear layer's updates: angles and spectra, energies, overlaps with weight masks; a row per run.

The base's factors, spectrum and masks are computed once for all runs. Every number stands beside its resolution, bound
or null.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from .. import geometry, nulls
from ..bitmask import BitMask
from ..geometry.spectra import norm_of
from ..ops.subspace import TopK, element, topk_svd
from .overlap import Chosen, chosen, overlaps
from .plan import Plan, Unit
from .rows import Tally
from .schema import GEOMETRY_COLUMNS, GEOMETRY_KEYS, SHIFTS

SIDES = nulls.SIDES


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

    def __init__(
        self,
        unit: Unit,
        plan: Plan,
        base: torch.Tensor,
        known: Factors | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``check`` is called between steps that take long, and may raise."""
        self.known, self.check = known, check
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
        if "spectrum" in options.metrics or "energy" in options.metrics:
            _ = self.solved  # before there is an update in memory
            self.check()
            difference = update_of(self.base, tuned)
        if "spectrum" in options.metrics:
            found, curves = self.spectrum(run, tuned, difference)
            self.check()
            row |= found
            curves = {key: row[key] for key in ("run", "name", "layer", "kind", "k", "resolution_degrees")} | curves
        if "energy" in options.metrics:
            row |= self.energy(difference, tally)
        if "masks" in options.metrics:
            row |= overlaps(self.chosen, update, tally, self.unit.total)
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
        return chosen(self.base, self.factors, self.options.alpha)

    # ---- of a tuned weight

    def spectrum(self, run: int, tuned: torch.Tensor, update: torch.Tensor) -> tuple[dict, dict]:
        """Angles of the top-k subspaces, shift of the spectrum, what bounds them, and what chance would give."""
        full, factors = self.solved
        sketch = geometry.update_sketch(update, self.k)
        # factors of an equal weight are these: an iteration would add its own error
        after = (self.known.tuned[run] if self.known else tuned) if sketch.norm else factors
        angles = geometry.principal_angles(factors, after, self.k, tol_degrees=self.options.tol_degrees)
        top = geometry.top_shift(factors, angles.tuned, sketch.norm)
        base_norm, tuned_norm = (float(norm_of(weight)) for weight in (self.base, tuned))
        self.check()
        shift = None
        if full is not None:
            shift = geometry.normalized_spectral_shift(full, tuned, weight=self.base, update=update)
        values = full.values if full is not None else geometry.estimated_values(factors, base_norm)
        spectra = (full, shift.tuned) if full and shift and shift.tuned else None
        bounds = geometry.bounds(factors, angles, self.base, sketch, spectra)
        largest = sketch.spectral_norm
        m, n = self.base.shape
        # its own draws for every matrix and run
        seed = zlib.crc32(f"{self.names[run]} {self.unit.name}".encode())
        left, right = nulls.isotropic_band(values, m, n, self.k, sketch.norm, seed=seed)
        moved = nulls.isotropic_shift(values, m, n, len(values) if full is not None else self.k, sketch.norm)
        whole_norm, top_norm = (float(x.double().norm()) for x in (values, factors.S))
        row = {
            "left_degrees": angles.max_left,
            "right_degrees": angles.max_right,
            "left_median_degrees": middle(angles.left),
            "right_median_degrees": middle(angles.right),
            "left_mean_degrees": float(angles.left.nan_to_num(0.0).mean()),
            "right_mean_degrees": float(angles.right.nan_to_num(0.0).mean()),
            **{
                f"{side}_degrees_isotropic{what}": float(found[0])
                for side, band in (("left", left), ("right", right))
                for what, found in zip(("", "_low", "_high"), band, strict=True)
            },
            "resolution_degrees": angles.resolution_degrees,
            "converged": angles.converged,
            "base_error_degrees": float(factors.error_degrees),
            "method": angles.tuned.method,
            "wedin_degrees": bounds.wedin_degrees,
            "gap": float(factors.gap),
            "nss": shift.nss if shift else None,
            "nss_error": shift.error if shift else None,
            "nss_mirsky": shift.mirsky if shift else None,
            "nss_isotropic": float(moved.norm()) / whole_norm if shift and whole_norm else None,
            "nss_k": top.nss,
            "nss_k_error": top.error,
            "nss_k_mirsky": top.mirsky,
            "nss_k_isotropic": float(moved[: self.k].norm()) / top_norm if top_norm else None,
            "largest_shift": bounds.observed_shift,
            "update_spectral_norm": largest,
            "shift_error": bounds.shift_error,
            "ky_fan": bounds.ky_fan,
            "ky_fan_shift": bounds.observed_ky_fan,
            "ky_fan_error": self.k * bounds.shift_error,
            "stable_rank_base": stable_rank(base_norm, factors),
            "stable_rank_tuned": stable_rank(tuned_norm, angles.tuned),
            "stable_rank_update": (sketch.norm / largest) ** 2 if largest else None,
            "update_top_energy": sketch.top_energy if largest else None,
        }
        if not sketch.norm:
            # no update moves nothing, whatever the weight
            seen = [shifts for option, shifts in SHIFTS.items() if option == "top" or shift]
            row |= {column: 0.0 for shifts in seen for column in shifts[:4]}
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        return row, {
            "left": known(angles.left),
            "right": known(angles.right),
            **{
                f"{side}_isotropic{what}": found.tolist()
                for side, band in (("left", left), ("right", right))
                for what, found in zip(("", "_low", "_high"), band, strict=True)
            },
            "values_base": factors.S.tolist(),
            "values_tuned": angles.tuned.S.tolist(),
        }

    def energy(self, update: torch.Tensor, tally: Tally) -> dict:
        """Shares of the update's energy in the base's top-k subspaces, beside those of an isotropic one, as it is and
        rounded to bf16; null for no update. z is against the rounded one."""
        found, factors = geometry.update_energy(self.factors, update), self.factors
        rounded = {}
        if tally.sigma:
            rounded = nulls.rounded_energy_nulls(self.base, factors.U, factors.Vh, tally.sigma)
        row: dict = {}
        for side in SIDES:
            share, plain = getattr(found, side), nulls.energy_null(self.unit.rows, self.unit.columns, self.k, side)
            none, null = math.isnan(share), rounded.get(side)
            null = None if null and math.isnan(null.mean) else null
            row |= {
                f"energy_{side}": None if none else share,
                f"energy_{side}_isotropic": plain.mean,
                f"energy_{side}_rounded": null.mean if null else None,
                f"energy_{side}_z": null.z_score(share) if null and not none else None,
            }
        return row


# Elements whose fp32 copy is held beside the update.
AT_ONCE = 1 << 20


def update_of(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Tuned minus base in fp32, without another copy of either."""
    update = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    step = max(1, AT_ONCE // max(1, base.shape[1]))
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        torch.sub(tuned[rows].float(), base[rows].float(), out=update[rows])
    return update


def stable_rank(norm: float, factors: TopK) -> float:
    """||W||_F^2 / ||W||_2^2; 0 for a zero weight."""
    return (norm / float(factors.S[0])) ** 2 if norm else 0.0


def finite(weight: torch.Tensor) -> bool:
    low, high = torch.aminmax(weight)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def middle(angles: torch.Tensor) -> float | None:
    """Median, the lower one of an even number; angles below resolution are the smallest. None where it is one."""
    found = float(angles.nan_to_num(-math.inf).median())
    return found if math.isfinite(found) else None


def known(angles: torch.Tensor) -> list[float | None]:
    """Angles with None below resolution."""
    return [None if math.isnan(angle) else angle for angle in angles.tolist()]
