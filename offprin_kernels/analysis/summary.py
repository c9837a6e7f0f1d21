"""Totals from the columns of the tables: everything that ``summary.json`` and the terminal table say."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np

from ..checkpoint import Checkpoint, Pairing
from ..nulls import Agreement, IntersectionNull, MarginNull, stratified_intersection
from .geometry_summary import geometry_summary
from .plan import Plan
from .rows import agreement_fields, sparsity

Columns = dict[str, np.ndarray]

SUMMED = ("sign_flips", "zero_to_nonzero", "nonzero_to_zero", "nan_base", "inf_base", "nan_tuned", "inf_tuned")


def context(plan: Plan, command: list[str]) -> dict:
    """What a summary says beside numbers: known before the first weight is read, and all that finishing needs."""
    return {
        "complete": plan.complete,
        "options": plan.options.describe(),
        "names": list(plan.names),
        "parts": len(plan.parts),
        "command": command,
        "base": {**source(plan.base), "config": plan.base.config},
        "tuned": [source(checkpoint) for checkpoint in plan.tuned],
        "ledger": {name: ledger(pairing) for name, pairing in zip(plan.names, plan.pairings, strict=True)},
    }


def summarize(context: dict, tables: dict, environment: dict) -> dict:
    """The content of ``summary.json``; deterministic for a plan and its files.

    ``tables``: columns of ``tensors`` and ``pairs``; rows of ``consensus`` and ``geometry``, empty if there are none.
    """
    options, names = context["options"], context["names"]
    tensors, pairs = tables["tensors"], tables["pairs"]
    geometry = [geometry_summary(options, name, tables["geometry"], tensors) for name in names]
    return {
        "complete": context["complete"],
        "options": options,
        "runs": [run_summary(options, name, tensors) for name in names],
        "pairs": [pair_summary(a, b, pairs) for a, b in itertools.combinations(names, 2)],
        "mean_jaccard": mean_jaccard(pairs),
        "consensus": consensus_summary(tables["consensus"], len(names)),
        "geometry": geometry if options["metrics"] else None,
        "provenance": {
            "command": context["command"],
            "environment": environment,
            "base": context["base"],
            "tuned": context["tuned"],
        },
        "ledger": context["ledger"],
    }


def run_summary(options: dict, name: str, tensors: Columns) -> dict:
    """Totals of one tuned run: all compared tensors, linear layers only, by kind and by layer."""
    rows = select(tensors, tensors["run"] == name)
    layers = [layer for layer in dict.fromkeys(rows["layer"]) if layer is not None]
    return {
        "run": name,
        "all": totals(options, rows),
        "linear": totals(options, select(rows, rows["linear"])),
        "by_kind": {kind: totals(options, select(rows, rows["kind"] == kind)) for kind in dict.fromkeys(rows["kind"])},
        "by_layer": {str(layer): totals(options, select(rows, rows["layer"] == layer)) for layer in layers},
        "cast": rows["name"][rows["status"] == "cast"].tolist(),
        "partial": rows["name"][rows["status"] == "partial"].tolist(),
        "flagged_nonfinite": rows["name"][rows["flagged_nonfinite"]].tolist(),
    }


def select(columns: Columns, keep: np.ndarray) -> Columns:
    return {name: values[keep] for name, values in columns.items()}


def totals(options: dict, rows: Columns) -> dict:
    """Integer counts summed, one division at the end. Norms leave out tensors with NaN or Inf, which are flagged."""
    total, changed = int(rows["total"].sum()), int(rows["changed"].sum())
    finite = select(rows, ~rows["flagged_nonfinite"])
    base, update = (float(np.sqrt((finite[key] ** 2).sum())) for key in ("base_norm", "update_norm"))
    along = base**2 + float(finite["base_dot_update"].sum())
    tuned = math.sqrt(max(0.0, 2 * along - base**2 + update**2))
    rules = {}
    for rule in options["rules"]:
        uncast = rows[f"changed_uncast_{rule}"]
        known = np.array([count is not None for count in uncast], dtype=bool)
        rules[rule] = {
            "changed": int(rows[f"changed_{rule}"].sum()),
            "changed_uncast": int(uncast[known].sum()) if known.any() else None,
            "total_uncast": int(rows["total"][known].sum()),
        }
    return {
        "tensors": len(rows["name"]),
        "total": total,
        "changed": changed,
        "sparsity": sparsity(changed, total),
        # of an isotropic update with each tensor's norm, rounded to bf16; over the tensors that have this null
        **isotropic_fields(rows),
        "rules": rules,
        **{key: int(rows[key].sum()) for key in SUMMED},
        "base_norm": base,
        "update_norm": update,
        "relative_update": update / base if base else None,
        # of all weights of base and run, as one vector each
        "cosine": along / (base * tuned) if base and tuned else None,
        "update_max": float(finite["update_max"].max()) if len(finite["update_max"]) else None,
    }


def isotropic_fields(rows: Columns) -> dict:
    """Expected and observed changes, over the tensors whose norm says what an isotropic update would change."""
    known = np.isfinite(rows["changed_isotropic"].astype(np.float64))
    return {
        "changed_isotropic": float(rows["changed_isotropic"][known].sum()),
        "isotropic_tensors": int(known.sum()),
        "isotropic_total": int(rows["total"][known].sum()),
        "isotropic_observed": int(rows["changed"][known].sum()),
    }


def pair_summary(a: str, b: str, pairs: Columns) -> dict:
    """Agreement of two runs: pooled over all coordinates (None: no tensor in common), and the mean over tensors.

    Pooled nulls, the uniform one too, are sums over tensors of each one's own, so that two runs which favour the same
    tensors do not seem to agree.
    """
    rows = select(pairs, (pairs["run_a"] == a) & (pairs["run_b"] == b))
    total, a_changed, b_changed, both = (
        int(rows[key].sum()) for key in ("total", "changed_a", "changed_b", "intersection")
    )
    uniform = stratified_intersection(rows["total"], rows["changed_a"], rows["changed_b"])
    exponent, variance, intersection, union = (
        float(rows[key].sum())
        for key in ("intersection_exponent", "intersection_exponent_variance", "intersection_margin", "union_margin")
    )
    conditioned, margin = IntersectionNull(exponent, variance), MarginNull(intersection, union)
    tensors, known = len(rows["name"]), np.isfinite(rows["union_isotropic"])
    isotropic = None
    if known.any():
        isotropic = Agreement(*(float(rows[f"{key}_isotropic"][known].sum()) for key in ("intersection", "union")))
    # what the isotropic null is to be held against: the tensors that have it
    seen = Agreement(*(float(rows[key][known].sum()) for key in ("intersection", "union")))
    return {
        "run_a": a,
        "run_b": b,
        "tensors": tensors,
        "total": total,
        "pooled": agreement_fields(a_changed, b_changed, both, uniform, conditioned, margin, isotropic)
        if tensors
        else None,
        "isotropic_tensors": int(known.sum()),
        "jaccard_of_these": seen.jaccard if isotropic else None,
        "mean_over_tensors": mean_jaccard(rows),
    }


def mean_jaccard(pairs: Columns) -> dict | None:
    """Mean Jaccard index over the rows, beside the means of its nulls; ``counted`` says over how many.

    Two empty masks, which have nothing to agree on, are left out; None where nothing is left.
    """
    rows = select(pairs, pairs["union"] > 0)
    counted = len(rows["name"])
    keys = ("jaccard", "jaccard_bernoulli", "jaccard_exponent", "jaccard_margin", "jaccard_isotropic",
            "excess_over_exponent")  # fmt: skip
    if not counted:
        return None
    return {"counted": counted, **{key: mean(rows[key]) for key in keys}}


def mean(values: np.ndarray) -> float | None:
    """Of the finite ones; None where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def consensus_summary(rows: list[dict], runs: int) -> dict | None:
    """Coordinates changed in exactly j runs, over the tensors that all runs share; None where there are none.

    The nulls are sums over tensors, as those of :func:`pair_summary`.
    """
    shared = [row for row in rows if row["runs"] == runs]
    if not shared:
        return None
    return {
        "runs": runs,
        "tensors": len(shared),
        "total": sum(row["total"] for row in shared),
        **{
            key: np.sum([row[key] for row in shared], axis=0).tolist()
            for key in ("coordinates", "expected_uniform", "expected_exponent")
        },
    }


def source(checkpoint: Checkpoint) -> dict:
    """Where weights came from: files, sizes, dtypes."""
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "root": str(checkpoint.root),
        "files": [{"name": file.path.name, "bytes": file.size} for file in checkpoint.files],
        "tensors": len(checkpoint.tensors),
        "dtypes": dict(sorted(Counter(info.dtype for info in checkpoint.tensors.values()).items())),
    }


def ledger(pairing: Pairing) -> dict:
    """Counts per side and status, and an entry for every tensor of both sides."""
    entries = [
        {
            "side": entry.side,
            "name": entry.name,
            "status": entry.status.value,
            "partner": entry.partner,
            "reason": entry.reason,
        }
        for entry in pairing.ledger
    ]
    return {"counts": pairing.counts(), "entries": entries}
