"""Totals of ``geometry.parquet``: medians over matrices, bounds beside observations, pooled overlaps."""

from __future__ import annotations

import math

import numpy as np

from ..nulls import IntersectionNull
from .schema import ENERGY_COLUMNS, NULLS, SHIFTS, WEIGHT_MASKS


def geometry_summary(options: dict, name: str, rows: list[dict], tensors: dict[str, np.ndarray]) -> dict:
    """Geometry of one run's linear layers: medians over matrices by kind, by layer and of all; overlaps pooled."""
    found = [row for row in rows if row["run"] == name]
    good = [row for row in found if row["note"] is None]
    kinds = dict.fromkeys(row["kind"] for row in good)
    layers = [layer for layer in dict.fromkeys(row["layer"] for row in good) if layer is not None]
    skipped = tensors["name"][(tensors["run"] == name) & ~tensors["linear"]]
    return {
        "run": name,
        "left_out": [{"name": row["name"], "why": row["note"]} for row in found if row["note"] is not None],
        "skipped": {
            "why": "no linear layer: vectors, embeddings and the head have no geometry here (arXiv 2511.08567, 5.1)",
            "names": skipped.tolist(),
        },
        "all": geometry_of(options, good),
        "by_kind": {kind: geometry_of(options, [row for row in good if row["kind"] == kind]) for kind in kinds},
        "by_layer": {str(at): geometry_of(options, [row for row in good if row["layer"] == at]) for at in layers},
    }


# medians over matrices
SPECTRUM_MEDIANS = (
    "left_degrees_isotropic", "right_degrees_isotropic",
    *(column for shift in SHIFTS.values() for column in (shift.observed, shift.isotropic, shift.mirsky)),
    "stable_rank_base", "stable_rank_tuned", "stable_rank_update", "update_top_energy",
)  # fmt: skip


def geometry_of(options: dict, rows: list[dict]) -> dict:
    result: dict = {"matrices": len(rows)}
    if not rows:
        return result
    result["k_smallest"] = min(row["k"] for row in rows)
    if "spectrum" in options["metrics"]:
        result |= {
            "resolved": sum(row["left_degrees"] is not None or row["right_degrees"] is not None for row in rows),
            "not_converged": sum(not row["converged"] for row in rows),
            "resolution_degrees": max(row["resolution_degrees"] for row in rows),
            # a matrix below its resolution counts as the smallest: medians stay honest while half are resolved
            "left_degrees": resolved_median(rows, "left_degrees"),
            "right_degrees": resolved_median(rows, "right_degrees"),
            **{column: median(rows, column) for column in SPECTRUM_MEDIANS},
            "bounds": {name: bound_of(rows, *columns) for name, columns in BOUNDS.items()},
        }
    if "energy" in options["metrics"]:
        result |= {column: median(rows, column) for column in ENERGY_COLUMNS}
    if "masks" in options["metrics"]:
        total, changed = sum(row["rows"] * row["columns"] for row in rows), sum(row["changed"] for row in rows)
        result["overlaps"] = {kind: overlap(rows, kind, total, changed) for kind in WEIGHT_MASKS}
    return result


# name -> (columns of observations, column of the bound, column of the observation's error)
BOUNDS = {
    "mirsky": (("nss",), "nss_mirsky", "nss_error"),
    "mirsky_k": (("nss_k",), "nss_k_mirsky", "nss_k_error"),
    "weyl": (("largest_shift",), "update_spectral_norm", "shift_error"),
    "wedin": (("left_degrees", "right_degrees"), "wedin_degrees", "resolution_degrees"),
    "ky_fan": (("ky_fan_shift",), "ky_fan", "ky_fan_error"),
}
# an angle of 90 degrees bounds nothing
NO_BOUND = {"wedin_degrees": 90.0}
# rounding of the bounds themselves, which are fp32 norms
ROUNDING = 1e-5


def bound_of(rows: list[dict], observed: tuple[str, ...], bound: str, error: str) -> dict:
    """Largest share of a bound that was observed, the median share, and how many matrices exceed it (none should).

    Of matrices with a bound and an observation larger than its error; exceeded: by more than the error.
    """
    shares, exceeded = [], 0
    for row in rows:
        seen = max((row[column] for column in observed if row[column] is not None), default=0.0)
        limit, slack = row[bound], row[error] or 0.0
        if limit and limit < NO_BOUND.get(bound, math.inf) and seen > slack:
            shares.append(seen / limit)
            exceeded += seen - slack > limit * (1 + ROUNDING)
    return {
        "matrices": len(shares),
        "largest_share": max(shares, default=None),
        "median_share": float(np.median(shares)) if shares else None,
        "exceeded": exceeded,
    }


def overlap(rows: list[dict], kind: str, total: int, changed: int) -> dict:
    """Share of changed weights inside a weight mask, pooled, beside what each null model expects."""
    keys = ("size", "changed", "variance_exponent", "variance_uniform", *(f"expected_{null}" for null in NULLS))
    sums = {key: sum(row[f"{kind}_{key}"] or 0 for row in rows) for key in keys}
    expected = {null: sums[f"expected_{null}"] / changed if changed else None for null in NULLS}
    known = [row for row in rows if row[f"{kind}_expected_isotropic"] is not None]
    # the isotropic null and what it is to be held against are of the matrices that have it
    known_changed = sum(row["changed"] for row in known)
    expected["isotropic"] = sums["expected_isotropic"] / known_changed if known_changed else None
    observed = sums["changed"] / changed if changed else None
    return {
        "density": sums["size"] / total,
        "overlap": observed,
        "isotropic_matrices": len(known),
        "overlap_of_these": sum(row[f"{kind}_changed"] for row in known) / known_changed if known_changed else None,
        **{f"expected_{null}": share for null, share in expected.items()},
        "excess": (sums["changed"] - sums["expected_exponent"]) / changed if changed else None,
        "z_uniform": IntersectionNull(sums["expected_uniform"], sums["variance_uniform"]).z_score(sums["changed"]),
        "z_exponent": IntersectionNull(sums["expected_exponent"], sums["variance_exponent"]).z_score(sums["changed"]),
    }


def median(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None and math.isfinite(row[key])]
    return float(np.median(values)) if values else None


def resolved_median(rows: list[dict], key: str) -> float | None:
    """Median where angles below resolution are the smallest; None where it falls on one of these.

    Between one of them and a resolved angle the unresolved one counts as 0: off by half a resolution at most.
    """
    angles = sorted(-math.inf if row[key] is None else row[key] for row in rows)
    low, high = angles[(len(angles) - 1) // 2], angles[len(angles) // 2]
    return None if high == -math.inf else (max(low, 0.0) + high) / 2
