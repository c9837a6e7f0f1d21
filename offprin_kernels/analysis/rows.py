"""Counts of one unit, added up slab by slab, and the rows of the tables that are made of them."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch

from .. import nulls
from ..ops import update_scan as op
from ..ops.update_scan import Rule, contract
from ..ops.update_scan.contract import RuleCode
from .plan import Plan, Unit


class Tally:
    """Sums of the scans of consecutive slabs of one tensor, base against one run."""

    def __init__(self, unit: Unit, rules: tuple[Rule, ...], run: int) -> None:
        self.stored_bf16 = unit.base.dtype == dict(unit.partners)[run].tuned.dtype == "BF16"
        self.bitwise = as_bitwise(rules[0])
        self.rule_counts = np.zeros((len(rules), 2), dtype=np.int64)
        self.counters = np.zeros(contract.COUNTERS, dtype=np.int64)
        self.ulp_histogram = np.zeros(contract.ULP_BINS, dtype=np.int64)
        self.exponent_histogram = np.zeros((2, contract.EXPONENT_BINS), dtype=np.int64)
        self.norms = np.zeros((2, contract.NORMS), dtype=np.float64)
        self.row_counts = np.zeros(unit.rows, dtype=np.int64)
        self.col_counts = np.zeros(unit.columns, dtype=np.int64)

    @cached_property
    def sigma(self) -> float | None:
        """Noise whose rounded update has this norm; None where no such null can be had. Once all is added.

        It takes weights that were stored as bf16: where both sides were rounded first, what is near a boundary crosses
        it in every run. NaN and Inf leave no norm.
        """
        if not self.stored_bf16 or any(self.counters[contract.NAN_BASE :]):
            return None
        norm = math.sqrt(self.norms[0, contract.UPDATE_SQUARED])
        sigma = nulls.isotropic_sigma(self.exponent_histogram[0], norm)
        return sigma if math.isfinite(sigma) else None

    @cached_property
    def isotropic(self) -> np.ndarray | None:
        """Weights by exponent that an isotropic update of this norm would visibly change, ``[256]``.

        None where there is no such null, or where the first rule asks for more than a visible change.
        """
        if self.sigma is None or not self.bitwise:
            return None
        return self.exponent_histogram[0] * nulls.rounding_visibility(self.sigma)

    def add(self, start_row: int, raw: op.ScanTensors) -> None:
        self.rule_counts += raw.rule_counts.cpu().numpy()
        self.counters += raw.counters.cpu().numpy()
        self.ulp_histogram += raw.ulp_histogram.cpu().numpy()
        self.exponent_histogram += raw.exponent_histogram.cpu().numpy()
        self.row_counts[start_row : start_row + raw.row_counts.numel()] = raw.row_counts.cpu().numpy()
        self.col_counts += raw.col_counts.cpu().numpy()
        norms = raw.norms.cpu().numpy()
        largest = np.maximum(self.norms[:, contract.UPDATE_MAX], norms[:, contract.UPDATE_MAX])  # NaN propagates
        self.norms += norms
        self.norms[:, contract.UPDATE_MAX] = largest


def tensor_row(unit: Unit, plan: Plan, run: int, tally: Tally) -> dict:
    """One row of ``tensors.parquet``."""
    partner = dict(unit.partners)[run]
    changed = int(tally.rule_counts[0, 0])
    counters = tally.counters.tolist()
    cast = not unit.base.dtype == partner.tuned.dtype == "BF16"
    row: dict = {
        "run": plan.names[run],
        "name": unit.name,
        "tuned_name": partner.tuned.name,
        "layer": unit.layer,
        "kind": unit.kind,
        "linear": unit.linear,
        "shape": list(unit.base.shape),
        "rows": unit.rows,
        "columns": unit.columns,
        "total": unit.total,
        "base_dtype": unit.base.dtype,
        "tuned_dtype": partner.tuned.dtype,
        "status": partner.status.value,
        "note": partner.note,
        "rule": str(plan.options.rules[0]),
        "changed": changed,
        "sparsity": sparsity(changed, unit.total),
        "changed_isotropic": None if tally.isotropic is None else float(tally.isotropic.sum()),
    }
    for rule, (count, uncast) in zip(plan.options.rules, tally.rule_counts.tolist(), strict=True):
        row[f"changed_{rule}"] = count
        row[f"changed_uncast_{rule}"] = uncast if cast and uncast >= 0 else None
    row |= {
        "sign_flips": counters[contract.SIGN_FLIPS],
        "zero_to_nonzero": counters[contract.ZERO_TO_NONZERO],
        "nonzero_to_zero": counters[contract.NONZERO_TO_ZERO],
        "nan_base": counters[contract.NAN_BASE],
        "inf_base": counters[contract.INF_BASE],
        "nan_tuned": counters[contract.NAN_TUNED],
        "inf_tuned": counters[contract.INF_TUNED],
        "flagged_nonfinite": any(counters[contract.NAN_BASE :]),
    }
    row |= norm_fields(tally.norms[0], "")
    row |= norm_fields(tally.norms[1] if cast else None, "uncast_")
    row |= dispersion_fields(tally, changed, unit)
    row |= {
        "ulp_histogram": tally.ulp_histogram,
        "exponent_all": tally.exponent_histogram[0],
        "exponent_changed": tally.exponent_histogram[1],
    }
    return row


def sparsity(changed: int, total: int) -> float | None:
    """1 - changed / total; None where there is nothing to compare."""
    return 1.0 - changed / total if total else None


def norm_fields(norms: np.ndarray | None, prefix: str) -> dict:
    """Norms from their squares; None where the un-cast values are the bf16 values themselves."""
    names = ("base_norm", "update_norm", "relative_update", "base_dot_update", "update_max")
    if norms is None:
        return {f"{prefix}{name}": None for name in names}
    base, update = math.sqrt(norms[contract.BASE_SQUARED]), math.sqrt(norms[contract.UPDATE_SQUARED])
    dot, largest = float(norms[contract.BASE_DOT_UPDATE]), float(norms[contract.UPDATE_MAX])
    values = (base, update, update / base if base else None, dot, largest)
    return {f"{prefix}{name}": value for name, value in zip(names, values, strict=True)}


def dispersion_fields(tally: Tally, changed: int, unit: Unit) -> dict:
    """Variance of row and column densities over that of independent coordinates of equal density (1: no stripes).

    None where there is but one row or one column, which cannot differ from the others.
    """
    fields = {}
    for axis, counts, length in (("row", tally.row_counts, unit.columns), ("column", tally.col_counts, unit.rows)):
        density = changed / unit.total if unit.total else 0.0
        expected = length * density * (1 - density)
        varies = expected and min(unit.rows, unit.columns) > 1
        fields[f"{axis}_dispersion"] = float(counts.var() / expected) if varies else None
    return fields


def stripe_rows(unit: Unit, plan: Plan, run: int, tally: Tally) -> list[dict]:
    """Row and column counts of a matrix (vectors have no stripes)."""
    if len(unit.base.shape) < 2:
        return []
    return [
        {"run": plan.names[run], "name": unit.name, "axis": axis, "length": length, "counts": counts}
        for axis, counts, length in (
            ("row", tally.row_counts, unit.columns),
            ("column", tally.col_counts, unit.rows),
        )
    ]


def pair_row(unit: Unit, plan: Plan, a: int, b: int, tallies: dict[int, Tally], intersection: int) -> dict:
    """One row of ``pairs.parquet``: agreement of two runs on one tensor, beside its null models."""
    changed_a, changed_b = (int(tallies[run].rule_counts[0, 0]) for run in (a, b))
    by_exponent = (tallies[run].exponent_histogram[1] for run in (a, b))
    uniform = nulls.stratified_intersection([unit.total], [changed_a], [changed_b])
    conditioned = nulls.stratified_intersection(tallies[a].exponent_histogram[0], *by_exponent)
    margins = (counts for run in (a, b) for counts in (tallies[run].row_counts, tallies[run].col_counts))
    margin = nulls.margin_null(*margins)
    isotropic = isotropic_agreement(tallies[a], tallies[b])
    return {
        "run_a": plan.names[a],
        "run_b": plan.names[b],
        "name": unit.name,
        "layer": unit.layer,
        "kind": unit.kind,
        "linear": unit.linear,
        "total": unit.total,
        **agreement_fields(changed_a, changed_b, intersection, uniform, conditioned, margin, isotropic),
    }


def agreement_fields(
    changed_a: int,
    changed_b: int,
    intersection: int,
    uniform: nulls.IntersectionNull,
    conditioned: nulls.IntersectionNull,
    margin: nulls.MarginNull,
    isotropic: nulls.Agreement | None,
) -> dict:
    """Observed agreement and lift over uniform masks; Bernoulli, exponent-conditioned, row/column-margin and isotropic
    nulls, the last of two independent Gaussian updates with the norms of these, rounded to bf16.

    Excess is over the exponent-conditioned null; z-scores are of |A & B|. Nulls of one tensor, or sums over several.
    """
    union = changed_a + changed_b - intersection
    jaccard = intersection / union if union else 1.0
    by_exponent = conditioned.jaccard(changed_a, changed_b)
    return {
        "changed_a": changed_a,
        "changed_b": changed_b,
        "intersection": intersection,
        "union": union,
        "jaccard": jaccard,
        "lift": intersection / uniform.mean if uniform.mean else None,
        "jaccard_bernoulli": uniform.jaccard(changed_a, changed_b),
        "jaccard_exponent": by_exponent,
        "jaccard_margin": margin.jaccard,
        "excess_over_exponent": jaccard - by_exponent,
        "z_bernoulli": uniform.z_score(intersection),
        "z_exponent": conditioned.z_score(intersection),
        "intersection_exponent": conditioned.mean,
        "intersection_exponent_variance": conditioned.variance,
        "intersection_margin": margin.intersection,
        "union_margin": margin.union,
        "jaccard_isotropic": isotropic.jaccard if isotropic else None,
        "intersection_isotropic": isotropic.intersection if isotropic else None,
        "union_isotropic": isotropic.union if isotropic else None,
    }


def isotropic_agreement(a: Tally, b: Tally) -> nulls.Agreement | None:
    """Agreement of two independent isotropic updates with the norms of these; None where there is no such null."""
    if a.isotropic is None or b.isotropic is None:
        return None
    sizes = a.exponent_histogram[0].astype(np.float64)
    both = float(np.divide(a.isotropic * b.isotropic, sizes, out=np.zeros_like(sizes), where=sizes > 0).sum())
    return nulls.Agreement(both, float((a.isotropic + b.isotropic).sum()) - both)


def as_bitwise(rule: Rule) -> bool:
    """Whether a rule says "changed" of every visible change of a normal bf16 value, and of nothing else."""
    limits = {RuleCode.BITWISE: 1.0, RuleCode.ULP: 1.0, RuleCode.ETA: 2.0**-9}
    return rule.threshold < limits.get(rule.code, 0.0)


def consensus_row(unit: Unit, votes: torch.Tensor, tallies: list[Tally]) -> dict:
    """Coordinates changed in exactly j runs (R times the consensus), observed and if runs were independent.

    The nulls are this tensor's own, so that their sums over tensors keep every tensor's density.
    """
    changed = [int(tally.rule_counts[0, 0]) for tally in tallies]
    by_exponent = [tally.exponent_histogram[1] for tally in tallies]
    return {
        "name": unit.name,
        "layer": unit.layer,
        "kind": unit.kind,
        "runs": len(tallies),
        "total": unit.total,
        "coordinates": votes.tolist(),
        "expected_uniform": nulls.independent_votes([unit.total], [[count] for count in changed]),
        "expected_exponent": nulls.independent_votes(tallies[0].exponent_histogram[0], by_exponent),
    }
