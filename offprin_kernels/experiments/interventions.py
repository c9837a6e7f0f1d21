"""RLVR on a base whose heads were rotated or permuted in some layers (arXiv 2511.08567, Fig. 6, section 4.3).

Runs of different seeds are compared: both from the base; one from the base and one from its rotated or permuted twin.
If where weights lie decides which of them change, agreement falls in the matrices that were touched, and only there.
Controls: the permuted run's masks mapped back through the inverse; the null of the rotated weights' own exponents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import intervene, nulls
from ..bitmask import BitMask
from ..checkpoint import Checkpoint
from ..numerics import bf16_codes
from ..updates import update_mask
from .compare import base_weights
from .lab import Lab
from .results import Result, Row

KINDS = ("rotate", "permute")
TWIN_SEEDS = (3, 4)
TOUCHED = {"rotate": ("v_proj", "o_proj"), "permute": ("q_proj", "k_proj", "v_proj", "o_proj")}


def run(lab: Lab) -> Result:
    base = lab.base()
    depth = 1 + max(int(name.split(".")[2]) for name in base_weights(base))
    layers = list(range(depth // 2, depth // 2 + max(1, depth // 4)))
    twins = {kind: twin(lab, kind, layers) for kind in KINDS}
    jobs = {("plain", seed): lab.rlvr("rlvr", seed) for seed in lab.seeds}
    # seeds that no plain run has; but one, to see that a permutation alone changes nothing
    for kind, seed in (*((kind, seed) for kind in KINDS for seed in TWIN_SEEDS), ("permute", 0)):
        jobs[kind, seed] = lab.rlvr(f"rlvr-{kind}", seed, base=str(twins[kind]))
    paths = dict(zip(jobs, lab.run(list(jobs.values())), strict=True))
    weights = {"plain": base_weights(base), **{kind: base_weights(twins[kind]) for kind in KINDS}}
    masks = {}
    for (arm, seed), path in paths.items():
        after = base_weights(path / "final")
        masks[arm, seed] = {name: update_mask(weights[arm][name], after[name]) for name in after}
    record = intervene.Intervention.load(twins["permute"])

    def row(where: str, names: list[str], label: str, arm: str, pairs: Iterable[tuple[int, int]], undo=None) -> Row:
        found = [pooled(names, weights["plain"], masks["plain", x], weights[arm], masks[arm, y], undo)
                 for x, y in pairs]  # fmt: skip
        excess = [f["excess"] for f in found]
        return {"where": where, "pair": label, "matrices": len(names), "pairs": len(found),
                **{key: float(np.mean([f[key] for f in found])) for key in found[0]},
                "low": min(excess), "high": max(excess),
                "range": f"{min(excess):+.4f} to {max(excess):+.4f}"}  # fmt: skip

    rows: list[Row] = []
    plain, crossed = list(itertools.combinations(lab.seeds, 2)), list(itertools.product(lab.seeds, TWIN_SEEDS))
    for place in ("touched", "untouched"):
        for kind in KINDS:
            names = [name for name in weights["plain"] if (place == "touched") == touched(name, kind, layers)]
            where = f"{place} by {kind}"
            rows.append(row(where, names, "from the base, too", "plain", plain))
            rows.append(row(where, names, f"from the {kind}d twin", kind, crossed))
            if kind == "permute" and place == "touched":
                rows.append(row(where, names, "the same, mapped back", kind, crossed, record))
                rows.append(row(where, names, "same seed, mapped back", kind, [(0, 0)], record))
    return Result(
        "Agreement of update masks with a run from a rotated or permuted base",
        rows,
        {
            "where": ("matrices", ""),
            "pair": ("second run", ""),
            "matrices": ("of them", "d"),
            "pairs": ("pairs", "d"),
            "jaccard": ("Jaccard, changed", ".4f"),
            "uniform": ("if uniform", ".4f"),
            "exponent": ("by exponent", ".4f"),
            "excess": ("excess over exponent", "+.4f"),
            "range": ("over pairs", ""),
            "z": ("z", "+.1f"),
            "kept": ("Jaccard, unchanged", ".4f"),
            "kept_exponent": ("unchanged by exponent", ".4f"),
        },
        [
            f"Interventions in layers {layers[0]} to {layers[-1]} of {depth}: a rotation touches V and O there, a "
            "permutation Q, K, V and O. Means over pairs of runs of different seeds, one of them from the base. The "
            "null by exponent takes each run's own base: weights of the same pair of exponents, before and after, are "
            "exchangeable.",
            "What the steps alone imply: AdamW treats coordinates alike, so it commutes with permutations (the row of "
            "the same seed, mapped back, is a check of that) and agreement must return with the inverse. It does not "
            "commute with rotations: where agreement falls there, the coordinates' basis and the optimizer's are one.",
        ],
        lambda figure: draw(figure, rows),
        size=(9, 4),
    )


def touched(name: str, kind: str, layers: list[int]) -> bool:
    """Whether an intervention changed a weight; names are such as ``model.layers.2.self_attn.v_proj.weight``."""
    _, _, layer, *_, part, _ = name.split(".")
    return int(layer) in layers and part in TOUCHED[kind]


def twin(lab: Lab, kind: str, layers: list[int]) -> Path:
    """The base, rotated or permuted in some layers."""
    path = lab.results("interventions") / f"base-{kind}d"
    if not path.exists():
        intervene.write(Checkpoint.open(lab.base()), kind, path, layers=layers, seed=1)
    return path


def pooled(
    names: list[str], base_a: dict[str, torch.Tensor], masks_a: dict[str, BitMask], base_b: dict[str, torch.Tensor],
    masks_b: dict[str, BitMask], undo: intervene.Intervention | None,
) -> dict[str, float]:  # fmt: skip
    """Agreement over several matrices, beside its nulls; with ``undo``, b is mapped back to a's coordinates first."""
    both = either = total = 0
    uniform, exponent = [], []
    counts = [0, 0]
    for name in names:
        a, b, codes = masks_a[name], masks_b[name], bf16_codes(base_b[name].bfloat16())
        if undo is not None:
            b, codes = intervene.invert_mask(b, name, undo), bf16_codes(base_a[name].bfloat16())
        x, y = a.to_dense().flatten(), b.to_dense().flatten()
        both, either = both + int((x & y).sum()), either + int((x | y).sum())
        total += x.numel()
        counts = [counts[0] + int(x.sum()), counts[1] + int(y.sum())]
        uniform.append(nulls.stratified_intersection([x.numel()], [int(x.sum())], [int(y.sum())]))
        # strata: the weight's exponent in either base
        strata = ((bf16_codes(base_a[name].bfloat16()) >> 7 & 0xFF) * 256 + (codes >> 7 & 0xFF)).flatten().long()
        tallies = [torch.bincount(strata[chosen], minlength=1 << 16).numpy() for chosen in (slice(None), x, y)]
        exponent.append(nulls.stratified_intersection(*tallies))
    null = nulls.IntersectionNull(sum(n.mean for n in exponent), sum(n.variance for n in exponent))
    by_chance = nulls.IntersectionNull(sum(n.mean for n in uniform), sum(n.variance for n in uniform))
    jaccard, expected = both / either if either else 1.0, null.jaccard(*counts)

    def kept(shared: float) -> float:
        # unchanged in both, over unchanged in either
        return (total - (sum(counts) - shared)) / (total - shared) if total > shared else 1.0

    return {"jaccard": jaccard, "uniform": by_chance.jaccard(*counts), "exponent": expected,
            "excess": jaccard - expected, "z": null.z_score(both),
            "kept": kept(both), "kept_exponent": kept(null.mean)}  # fmt: skip


def draw(figure: Any, rows: list[Row]) -> None:
    """What rounding does not explain; whiskers from the lowest to the highest pair."""
    axes = figure.subplots()
    rows = [row for row in rows if not row["pair"].startswith("same seed")]
    excess, at = [row["excess"] for row in rows], np.arange(len(rows))
    whiskers = [[row["excess"] - row["low"] for row in rows], [row["high"] - row["excess"] for row in rows]]
    colors = ["C0" if row["pair"] == "from the base, too" else "C1" for row in rows]
    axes.barh(at, excess, xerr=whiskers, color=colors, capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(at, [f"{row['where']}: {row['pair']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("Jaccard index of update masks, excess over the exponent null", fontsize=8)
