"""RLVR on a base whose heads were rotated or permuted in some layers (arXiv 2511.08567, Fig. 6, section 4.3).

Two runs of other seeds are compared: both from the base; one from the base and one from its rotated or permuted twin.
Where the geometry decides which weights change, agreement falls where it was changed, and only there. Controls: the
permuted run's masks mapped back through the inverse; the rotated run's agreement beside its own null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import intervene, nulls
from ..bitmask import BitMask
from ..checkpoint import Checkpoint
from ..numerics import bf16_codes
from ..training.model import linear_weights, load_checkpoint
from ..updates import update_mask
from .lab import Lab
from .results import Result

KINDS = ("rotate", "permute")
TOUCHED = {"rotate": ("v_proj", "o_proj"), "permute": ("q_proj", "k_proj", "v_proj", "o_proj")}


def run(lab: Lab) -> Result:
    base = lab.base()
    depth = 1 + max(int(name.split(".")[2]) for name in linear_weights(load_checkpoint(base)))
    layers = list(range(depth // 2, depth // 2 + max(1, depth // 4)))
    twins = {kind: twin(lab, kind, layers) for kind in KINDS}
    seeds = lab.seeds[:2]
    jobs = {("plain", seed): lab.rlvr("rlvr", seed) for seed in seeds}
    for kind in KINDS:
        jobs |= {(kind, seed): lab.rlvr(f"rlvr-{kind}", seed, base=str(twins[kind])) for seed in seeds}
    paths = dict(zip(jobs, lab.run(list(jobs.values())), strict=True))
    weights = {"plain": tensors(base), **{kind: tensors(twins[kind]) for kind in KINDS}}
    masks = {}
    for (arm, seed), path in paths.items():
        after = tensors(path / "final")
        masks[arm, seed] = {name: update_mask(weights[arm][name], after[name]) for name in after}
    rows: list[dict[str, Any]] = []
    for where in ("changed layers", "other layers"):
        for kind in KINDS:
            names = [name for name in masks["plain", seeds[0]]
                     if (where == "changed layers") == touched(name, kind, layers)]  # fmt: skip
            arms: list[tuple[str, str, intervene.Intervention | None]] = [
                ("plain", "from the base, too", None), (kind, f"from the {kind}d twin", None)
            ]  # fmt: skip
            if kind == "permute" and where == "changed layers":
                arms.append((kind, "from the permuted twin, mapped back", intervene.Intervention.load(twins[kind])))
            for arm, label, undo in arms:
                # either seed once from the base
                found = [
                    pooled(names, weights["plain"], masks["plain", x], weights[arm], masks[arm, y], undo)
                    for x, y in (seeds, seeds[::-1])
                ]
                rows.append({"where": f"{where}, {kind}", "pair": label, "matrices": len(names),
                             **{key: float(np.mean([f[key] for f in found])) for key in found[0]}})  # fmt: skip
    return Result(
        "Agreement of update masks with a run from a rotated or permuted base",
        rows,
        {
            "where": ("where", ""),
            "pair": ("second run", ""),
            "matrices": ("matrices", "d"),
            "jaccard": ("Jaccard", ".4f"),
            "uniform": ("if uniform", ".4f"),
            "exponent": ("by exponent", ".4f"),
            "excess": ("excess over exponent", "+.4f"),
            "z": ("z", "+.1f"),
        },
        [
            f"Changed: layers {layers[0]} to {layers[-1]} of {depth}; a rotation changes V and O there, a permutation "
            "Q, K, V and O. Means over both orders of two seeds. The null by exponent takes each run's own base: "
            "weights of the same pair of exponents, before and after the intervention, are exchangeable."
        ],
        lambda figure: draw(figure, rows),
        size=(9, 4),
    )  # fmt: skip


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


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in linear_weights(load_checkpoint(path)).items()}


def pooled(
    names: list[str], base_a: dict[str, torch.Tensor], masks_a: dict[str, BitMask], base_b: dict[str, torch.Tensor],
    masks_b: dict[str, BitMask], undo: intervene.Intervention | None,
) -> dict[str, float]:  # fmt: skip
    """Agreement over several matrices, beside its nulls; with ``undo``, b is mapped back to a's coordinates first."""
    both = either = 0
    uniform, exponent = [], []
    counts = [0, 0]
    for name in names:
        a, b, codes = masks_a[name], masks_b[name], bf16_codes(base_b[name].bfloat16())
        if undo is not None:
            b, codes = intervene.invert_mask(b, name, undo), bf16_codes(base_a[name].bfloat16())
        x, y = a.to_dense().flatten(), b.to_dense().flatten()
        both, either = both + int((x & y).sum()), either + int((x | y).sum())
        counts = [counts[0] + int(x.sum()), counts[1] + int(y.sum())]
        uniform.append(nulls.stratified_intersection([x.numel()], [int(x.sum())], [int(y.sum())]))
        # strata: the weight's exponent in either base
        strata = ((bf16_codes(base_a[name].bfloat16()) >> 7 & 0xFF) * 256 + (codes >> 7 & 0xFF)).flatten().long()
        tallies = [torch.bincount(strata[chosen], minlength=1 << 16).numpy() for chosen in (slice(None), x, y)]
        exponent.append(nulls.stratified_intersection(*tallies))
    null = nulls.IntersectionNull(sum(n.mean for n in exponent), sum(n.variance for n in exponent))
    by_chance = nulls.IntersectionNull(sum(n.mean for n in uniform), sum(n.variance for n in uniform))
    jaccard, expected = both / either if either else 1.0, null.jaccard(*counts)
    return {"jaccard": jaccard, "uniform": by_chance.jaccard(*counts), "exponent": expected,
            "excess": jaccard - expected, "z": null.z_score(both)}  # fmt: skip


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    at = np.arange(len(rows))
    axes.barh(at, [row["jaccard"] for row in rows], color=["C0" if "base" in row["pair"] else "C1" for row in rows])
    axes.plot([row["exponent"] for row in rows], at, "|", color="black", markersize=18, label="by exponent")
    axes.plot([row["uniform"] for row in rows], at, "|", color="red", markersize=18, label="if uniform")
    axes.set_yticks(at, [f"{row['where']}: {row['pair']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("Jaccard index of update masks", fontsize=8)
    axes.legend(fontsize=8)
